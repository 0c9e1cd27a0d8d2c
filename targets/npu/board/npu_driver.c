/* From what kernels ask for to commands. What the device need not do again is left out: parameters that are in a slot
 * already, weights that are in the array already, and clearing, which is overwriting instead of adding. */
#include "npu.h"

#include <string.h>

void (*npu_finished)(int64_t cycles);

static uint8_t is_clear[NPU_ACCUMULATOR_WORDS];
static const int32_t *slot_parameters[2];
static int last_slot;
static int32_t array_weights = -1; /* address of the weights in the array */

int32_t npu_load_activations(const int8_t *source, int32_t word_stride, int32_t lane_stride, int32_t address,
                             int32_t words)
{
    static int8_t gathered[NPU_ACTIVATION_WORDS * NPU_ROWS];
    for (int32_t w = 0; w < words; ++w)
        for (int32_t i = 0; i < NPU_ROWS; ++i)
            gathered[w * NPU_ROWS + i] = source[w * word_stride + i * lane_stride];
    npu_command command = {.opcode = NPU_LOAD_ACTIVATIONS, .address = address, .count = words};
    npu_device_issue(&command, gathered, 0, 0);
    return 0;
}

int32_t npu_load_weights(const int8_t *source, int32_t address, int32_t words)
{
    if (array_weights < address + words && address < array_weights + NPU_ROWS) array_weights = -1;
    npu_command command = {.opcode = NPU_LOAD_WEIGHTS, .address = address, .count = words};
    npu_device_issue(&command, source, 0, 0);
    return 0;
}

int32_t npu_clear(int32_t accumulator_address, int32_t rows)
{
    memset(is_clear + accumulator_address, 1, (size_t)rows);
    return 0;
}

int32_t npu_tile(int32_t activation_address, int32_t weight_address, int32_t accumulator_address, int32_t count)
{
    int32_t rows = NPU_WEIGHT_STATIONARY ? count : NPU_ROWS;
    npu_command command = {
        .opcode = NPU_TILE,
        .address = activation_address,
        .weight_address = weight_address,
        .accumulator_address = accumulator_address,
        .count = count,
        .rows = rows,
        .accumulate = !is_clear[accumulator_address],
        .reload = NPU_WEIGHT_STATIONARY && weight_address != array_weights,
    };
    memset(is_clear + accumulator_address, 0, (size_t)rows);
    array_weights = weight_address;
    npu_device_issue(&command, 0, 0, 0);
    return 0;
}

static int32_t parameter_byte(const int32_t *parameters, int byte, int channel)
{
    if (byte < 4) return parameters[channel] >> 8 * byte;
    if (byte < 6) return parameters[NPU_COLUMNS + channel] >> 8 * (byte - 4);
    return parameters[2 * NPU_COLUMNS + channel];
}

static int slot_of(const int32_t *parameters)
{
    static int8_t words[NPU_PARAMETER_BYTES * NPU_COLUMNS];
    if (slot_parameters[last_slot] == parameters) return last_slot;
    last_slot = !last_slot;
    if (slot_parameters[last_slot] == parameters) return last_slot;
    slot_parameters[last_slot] = parameters;
    npu_command command = {.opcode = NPU_LOAD_PARAMETERS, .count = NPU_PARAMETER_BYTES, .slot = last_slot};
    for (int byte = 0; byte < NPU_PARAMETER_BYTES; ++byte)
        for (int channel = 0; channel < NPU_COLUMNS; ++channel)
            words[byte * NPU_COLUMNS + channel] = (int8_t)parameter_byte(parameters, byte, channel);
    npu_device_issue(&command, words, 0, 0);
    return last_slot;
}

int32_t npu_store(int8_t *target, int32_t row_stride, int32_t accumulator_address, int32_t rows,
                  const int32_t *parameters, int32_t zero_point, int32_t lower, int32_t upper)
{
    npu_command command = {
        .opcode = NPU_STORE,
        .address = accumulator_address,
        .rows = rows,
        .slot = slot_of(parameters),
        .zero_point = zero_point,
        .lower = lower,
        .upper = upper,
    };
    npu_device_issue(&command, 0, target, row_stride);
    return 0;
}

int32_t npu_finish(void)
{
    npu_device_finish();
    /* The next layer starts from nothing, so that its cycles do not depend on the layer before. */
    slot_parameters[0] = slot_parameters[1] = 0;
    last_slot = 0;
    array_weights = -1;
    if (npu_finished) npu_finished(npu_device_cycles());
    return 0;
}
