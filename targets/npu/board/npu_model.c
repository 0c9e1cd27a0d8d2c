/* The device as a program: commands compute what the circuit computes, and cycles are counted by the closed forms at
 * the head of npu.v. A command is taken in the first cycle in which its unit is idle and nobody uses the halves of
 * buffers that it needs; the host gives at most one command a cycle. */
#include "npu.h"

static int8_t activations[NPU_ACTIVATION_WORDS][NPU_ROWS];
static int8_t weights[NPU_WEIGHT_WORDS][NPU_COLUMNS];
static uint8_t parameters[2][NPU_PARAMETER_BYTES][NPU_COLUMNS];
static int32_t sums[NPU_ACCUMULATOR_WORDS][NPU_COLUMNS];
static int8_t array[NPU_ROWS][NPU_COLUMNS]; /* weight stationary: the weights in the array */

enum { LOAD, TILE, STORE, UNITS };
enum { IN_ACTIVATIONS = 1, IN_WEIGHTS = 4, IN_SUMS = 16, IN_PARAMETERS = 64 }; /* two bits each: halves of a buffer */

static int64_t next_issue, finished, is_free[UNITS];
static int32_t uses[UNITS];

static int32_t halves(int32_t first, int32_t length, int32_t words)
{
    return (first < words / 2 ? 1 : 0) | (first + length > words / 2 ? 2 : 0);
}

static int32_t needs_of(const npu_command *c)
{
    int32_t read = NPU_WEIGHT_STATIONARY ? (c->reload ? NPU_ROWS : 0) : c->count;
    switch (c->opcode) {
    case NPU_LOAD_ACTIVATIONS: return IN_ACTIVATIONS * halves(c->address, c->count, NPU_ACTIVATION_WORDS);
    case NPU_LOAD_WEIGHTS: return IN_WEIGHTS * halves(c->address, c->count, NPU_WEIGHT_WORDS);
    case NPU_LOAD_PARAMETERS: return IN_PARAMETERS << c->slot;
    case NPU_STORE:
        return IN_SUMS * halves(c->address, c->rows, NPU_ACCUMULATOR_WORDS) | IN_PARAMETERS << c->slot;
    default:
        return IN_ACTIVATIONS * halves(c->address, c->count, NPU_ACTIVATION_WORDS)
               | (read ? IN_WEIGHTS * halves(c->weight_address, read, NPU_WEIGHT_WORDS) : 0)
               | IN_SUMS * halves(c->accumulator_address, c->rows, NPU_ACCUMULATOR_WORDS);
    }
}

static int32_t cycles_of(const npu_command *c)
{
    if (c->opcode == NPU_STORE) return c->rows + 6;
    if (c->opcode != NPU_TILE) return c->count + 1;
    if (NPU_WEIGHT_STATIONARY) return (c->reload ? NPU_ROWS : 0) + c->count + NPU_ROWS + NPU_COLUMNS + 1;
    return c->count + c->rows + NPU_ROWS + NPU_COLUMNS;
}

static void count_cycles(const npu_command *c)
{
    int unit = c->opcode == NPU_TILE ? TILE : c->opcode == NPU_STORE ? STORE : LOAD;
    int32_t needs = needs_of(c);
    int64_t taken = next_issue;
    for (int other = 0; other < UNITS; ++other)
        if ((other == unit || (uses[other] & needs)) && is_free[other] > taken) taken = is_free[other];
    next_issue = taken + 1;
    is_free[unit] = taken + cycles_of(c);
    uses[unit] = needs;
}

static void load(const npu_command *c, const int8_t *words)
{
    int32_t lanes = c->opcode == NPU_LOAD_ACTIVATIONS ? NPU_ROWS : NPU_COLUMNS;
    for (int32_t w = 0; w < c->count; ++w)
        for (int32_t i = 0; i < lanes; ++i) {
            int8_t byte = words[w * lanes + i];
            if (c->opcode == NPU_LOAD_ACTIVATIONS) activations[c->address + w][i] = byte;
            else if (c->opcode == NPU_LOAD_WEIGHTS) weights[c->address + w][i] = byte;
            else parameters[c->slot][w][i] = (uint8_t)byte;
        }
}

static void add_products(const npu_command *c, int32_t row, int32_t column)
{
    int32_t sum = c->accumulate ? sums[c->accumulator_address + row][column] : 0;
    if (NPU_WEIGHT_STATIONARY)
        for (int32_t k = 0; k < NPU_ROWS; ++k) sum += activations[c->address + row][k] * array[k][column];
    else
        for (int32_t k = 0; k < c->count; ++k)
            sum += activations[c->address + k][row] * weights[c->weight_address + k][column];
    sums[c->accumulator_address + row][column] = sum;
}

static void tile(const npu_command *c)
{
    if (NPU_WEIGHT_STATIONARY && c->reload)
        for (int32_t k = 0; k < NPU_ROWS; ++k)
            for (int32_t j = 0; j < NPU_COLUMNS; ++j) array[k][j] = weights[c->weight_address + k][j];
    for (int32_t row = 0; row < c->rows; ++row)
        for (int32_t column = 0; column < NPU_COLUMNS; ++column) add_products(c, row, column);
}

static int8_t requantized(const npu_command *c, int32_t sum, int32_t channel)
{
    uint8_t p[NPU_PARAMETER_BYTES];
    for (int b = 0; b < NPU_PARAMETER_BYTES; ++b) p[b] = parameters[c->slot][b][channel];
    int32_t bias = (int32_t)((uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
    int64_t product = ((int64_t)sum + bias) * (p[4] | p[5] << 8);
    int64_t value = ((product + (INT64_C(1) << (p[6] - 1))) >> p[6]) + c->zero_point;
    return (int8_t)(value > c->upper ? c->upper : value < c->lower ? c->lower : value);
}

void npu_device_issue(const npu_command *c, const int8_t *words, int8_t *target, int32_t row_stride)
{
    count_cycles(c);
    if (c->opcode == NPU_TILE) tile(c);
    else if (c->opcode != NPU_STORE) load(c, words);
    else
        for (int32_t r = 0; r < c->rows; ++r)
            for (int32_t j = 0; j < NPU_COLUMNS; ++j)
                target[r * row_stride + j] = requantized(c, sums[c->address + r][j], j);
}

void npu_device_finish(void)
{
    for (int unit = 0; unit < UNITS; ++unit)
        if (is_free[unit] > finished) finished = is_free[unit];
    next_issue = finished;
}

int64_t npu_device_cycles(void) { return finished; }
