// The device as a simulation of its circuit, cycle by cycle. npu_simulated.cc is written by yosys (write_cxxrtl).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "npu_simulated.cc"
#include "npu.h"

namespace {

cxxrtl_design::p_npu__top circuit;
int64_t cycles;

std::vector<int8_t> loading;  // words that the load command still asks for
size_t loaded, load_width;
int8_t *target;  // where the store command's next row goes
int32_t target_stride, target_rows;

constexpr int64_t LONGEST_WAIT = 1 << 20;

template <size_t BITS> uint32_t *chunks(cxxrtl::value<BITS> &port) { return port.data; }
template <size_t BITS> uint32_t *chunks(cxxrtl::wire<BITS> &port) { return port.curr.data; }
template <class Port> bool is_high(Port &port) { return chunks(port)[0] & 1; }

void present_word()
{
    bool valid = loaded < loading.size();
    circuit.p_in__valid.set<bool>(valid);
    if (!valid) return;
    uint8_t bytes[(NPU_LANES + 3) / 4 * 4] = {};
    std::memcpy(bytes, loading.data() + loaded, load_width);
    std::memcpy(chunks(circuit.p_in__data), bytes, sizeof bytes);
}

void take_row()
{
    if (target_rows == 0) std::abort();  // a row that nobody asked for
    uint8_t bytes[(NPU_COLUMNS + 3) / 4 * 4];
    std::memcpy(bytes, chunks(circuit.p_out__data), sizeof bytes);
    std::memcpy(target, bytes, NPU_COLUMNS);
    target += target_stride;
    --target_rows;
}

// Lets the circuit settle in the first half of a cycle.
void settle()
{
    present_word();
    circuit.p_clk.set<bool>(false);
    circuit.step();
}

void finish_cycle()
{
    bool word = loaded < loading.size() && is_high(circuit.p_in__ready);
    if (is_high(circuit.p_out__valid)) take_row();
    circuit.p_clk.set<bool>(true);
    circuit.step();
    if (word) loaded += load_width;
    ++cycles;
}

void reset()
{
    circuit.p_out__ready.set<bool>(true);
    circuit.p_command__valid.set<bool>(false);
    circuit.p_reset.set<bool>(true);
    settle();
    finish_cycle();
    circuit.p_reset.set<bool>(false);
    cycles = 0;
}

void present(const npu_command &c)
{
    circuit.p_opcode.set<uint8_t>(c.opcode);
    circuit.p_address.set<uint16_t>(c.address);
    circuit.p_weight__address.set<uint16_t>(c.weight_address);
    circuit.p_accumulator__address.set<uint16_t>(c.accumulator_address);
    circuit.p_count.set<uint16_t>(c.count);
    circuit.p_rows.set<uint16_t>(c.rows);
    circuit.p_accumulate.set<bool>(c.accumulate);
    circuit.p_reload.set<bool>(c.reload);
    circuit.p_slot.set<bool>(c.slot);
    circuit.p_zero__point.set<uint8_t>(static_cast<uint8_t>(c.zero_point));
    circuit.p_lower.set<uint8_t>(static_cast<uint8_t>(c.lower));
    circuit.p_upper.set<uint8_t>(static_cast<uint8_t>(c.upper));
    circuit.p_command__valid.set<bool>(true);
}

void hang(const char *what)
{
    std::fprintf(stderr, "the circuit hangs: %s\n", what);
    std::exit(1);
}

}  // namespace

extern "C" void npu_device_issue(const npu_command *c, const int8_t *words, int8_t *destination, int32_t row_stride)
{
    static bool is_reset = false;
    if (!is_reset) reset();
    is_reset = true;
    present(*c);
    for (int64_t waited = 0;; ++waited) {
        settle();
        bool taken = is_high(circuit.p_command__ready);
        finish_cycle();
        if (taken) break;
        if (waited == LONGEST_WAIT) hang("a command is not taken");
    }
    circuit.p_command__valid.set<bool>(false);
    if (c->opcode == NPU_STORE) {
        target = destination;
        target_stride = row_stride;
        target_rows = c->rows;
    } else if (c->opcode != NPU_TILE) {
        load_width = c->opcode == NPU_LOAD_ACTIVATIONS ? NPU_ROWS : NPU_COLUMNS;
        loading.assign(words, words + c->count * load_width);
        loaded = 0;
    }
}

extern "C" void npu_device_finish(void)
{
    for (int64_t waited = 0;; ++waited) {
        settle();
        if (is_high(circuit.p_idle)) break;
        finish_cycle();
        if (waited == LONGEST_WAIT) hang("it never becomes idle");
    }
}

extern "C" int64_t npu_device_cycles(void) { return cycles; }
