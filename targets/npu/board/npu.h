/* The accelerator as kernels see it. Its size comes from npu_size.h, which is generated from the target's profile.
 *
 * Addresses count words: of NPU_ROWS bytes in the activation buffer, of NPU_COLUMNS bytes in the weight buffer, of
 * NPU_COLUMNS sums in the accumulator buffer. Commands run in the background; npu_finish waits for all of them. */
#ifndef NPU_H
#define NPU_H

#include <stdint.h>

#include "npu_size.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Of a channel: bias (4), multiplier (2), shift (1). As words: byte b of all channels is word b. */
enum { NPU_PARAMETER_BYTES = 7 };
enum { NPU_LANES = NPU_ROWS > NPU_COLUMNS ? NPU_ROWS : NPU_COLUMNS };

/* ---- what kernels call */

/* Writes words to the activation buffer: lane i of word w is source[w * word_stride + i * lane_stride]. */
int32_t npu_load_activations(const int8_t *source, int32_t word_stride, int32_t lane_stride, int32_t address,
                             int32_t words);
/* Writes words to the weight buffer: they lie one behind the other. */
int32_t npu_load_weights(const int8_t *source, int32_t address, int32_t words);
/* Says that the next tile overwrites these rows of the accumulator buffer. */
int32_t npu_clear(int32_t accumulator_address, int32_t rows);
/* Output stationary: adds the products of `count` words of activations and of weights to NPU_ROWS rows.
 * Weight stationary: adds the products of `count` words of activations and NPU_ROWS words of weights to as many rows. */
int32_t npu_tile(int32_t activation_address, int32_t weight_address, int32_t accumulator_address, int32_t count);
/* Requantizes rows of sums into target[row * row_stride + column]. Parameters: NPU_COLUMNS biases, as many multipliers
 * of 16 bits, as many shifts of 1 to 48 places. */
int32_t npu_store(int8_t *target, int32_t row_stride, int32_t accumulator_address, int32_t rows,
                  const int32_t *parameters, int32_t zero_point, int32_t lower, int32_t upper);
int32_t npu_finish(void);

/* ---- what a device is: one of npu_model.c, npu_rtl.cc, or the driver of a chip */

enum { NPU_LOAD_ACTIVATIONS, NPU_LOAD_WEIGHTS, NPU_LOAD_PARAMETERS, NPU_TILE, NPU_STORE };

typedef struct {
    int32_t opcode, address, weight_address, accumulator_address, count, rows;
    int32_t accumulate, reload, slot, zero_point, lower, upper;
} npu_command;

/* Gives a command. Loads: `words` are count words of NPU_ROWS (activations) or NPU_COLUMNS bytes, copied at once.
 * Stores: row r goes to target[r * row_stride ...], which holds it once npu_device_finish has returned. */
void npu_device_issue(const npu_command *command, const int8_t *words, int8_t *target, int32_t row_stride);
void npu_device_finish(void);
/* Cycles from the first command to the end of the last npu_device_finish, waiting for the host not counted. */
int64_t npu_device_cycles(void);

/* Called by npu_finish, if the program wants to know: cycles so far. */
extern void (*npu_finished)(int64_t cycles);

#ifdef __cplusplus
}
#endif

#endif
