// Simulates a network that yosys translated to C++ (write_cxxrtl): frames in, frames and inner streams out.
// simulate INPUT FOLDER FRAMES IN_BEATS OUT_BEATS LIMIT STALLS
//   INPUT     bytes of all input transfers
//   FOLDER    where out.bin and tap_K.bin go, and cycles.txt: cycles, first input, then the end of every frame
//   LIMIT     cycles without any transfer after which the circuit counts as stuck
//   STALLS    0: never wait; otherwise the seed of a pattern in which both ends wait at random
#include "network.cc"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

template <size_t Bits>
const uint32_t *chunks(const cxxrtl::value<Bits> &v) { return v.data; }
template <size_t Bits>
const uint32_t *chunks(const cxxrtl::wire<Bits> &w) { return w.curr.data; }
template <size_t Bits>
constexpr size_t bits_of(const cxxrtl::value<Bits> &) { return Bits; }
template <size_t Bits>
constexpr size_t bits_of(const cxxrtl::wire<Bits> &) { return Bits; }

template <size_t Bits>
void put(cxxrtl::value<Bits> &v, const uint8_t *bytes) {
  uint32_t *to = v.data;
  for (size_t k = 0; k < (Bits + 31) / 32; k++) to[k] = 0;
  std::memcpy(to, bytes, Bits / 8);
}

// A stream's bytes, buffered; the bit above the data says that a transfer happens in this cycle.
struct Recorder {
  std::FILE *file = nullptr;
  void open(const std::string &path) {
    file = std::fopen(path.c_str(), "wb");
    if (!file) { std::perror(path.c_str()); std::exit(2); }
  }
  void write(const uint32_t *data, size_t bytes) { std::fwrite(data, 1, bytes, file); }
};

template <typename Port>
void record(Recorder &recorder, const Port &port) {
  const uint32_t *data = chunks(port);
  const size_t top = bits_of(port) - 1;
  if (data[top / 32] >> (top % 32) & 1) recorder.write(data, top / 8);
}

std::vector<uint8_t> read_all(const char *path) {
  std::FILE *file = std::fopen(path, "rb");
  if (!file) { std::perror(path); std::exit(2); }
  std::fseek(file, 0, SEEK_END);
  std::vector<uint8_t> bytes(std::ftell(file));
  std::rewind(file);
  if (std::fread(bytes.data(), 1, bytes.size(), file) != bytes.size()) std::exit(2);
  std::fclose(file);
  return bytes;
}

uint32_t next(uint32_t &state) {
  state ^= state << 13;
  state ^= state >> 17;
  state ^= state << 5;
  return state;
}

}  // namespace

int main(int count, char **words) {
  if (count != 8) return 2;
  const std::vector<uint8_t> input = read_all(words[1]);
  const std::string folder = words[2];
  const long frames = std::atol(words[3]), in_beats = std::atol(words[4]), out_beats = std::atol(words[5]);
  const long limit = std::atol(words[6]);
  uint32_t stalls = std::strtoul(words[7], nullptr, 10);

  static cxxrtl_design::TOP top;
  const size_t in_bytes = bits_of(top.p_in__data) / 8, out_bytes = bits_of(top.p_out__data) / 8;
  Recorder out, taps[TAP_COUNT + 1];
  out.open(folder + "/out.bin");
  for (int k = 0; k < TAP_COUNT; k++) taps[k].open(folder + "/tap_" + std::to_string(k) + ".bin");

  const auto edge = [&] {
    top.p_clk.set<bool>(false);
    top.step();
    top.p_clk.set<bool>(true);
    top.step();
  };
  top.p_rst.set<bool>(true);
  top.p_in__valid.set<bool>(false);
  top.p_out__ready.set<bool>(false);
  for (int k = 0; k < 4; k++) edge();
  top.p_rst.set<bool>(false);

  std::vector<long> ends;
  long cycle = 0, sent = 0, received = 0, quiet = 0, started = 0;
  while (received < frames * out_beats) {
    const bool offer = sent < frames * in_beats && (!stalls || next(stalls) % 3);
    top.p_in__valid.set<bool>(offer);
    if (offer) put(top.p_in__data, input.data() + sent * in_bytes);
    top.p_out__ready.set<bool>(!stalls || next(stalls) % 3);
    top.p_clk.set<bool>(false);
    top.step();
    const bool taken = offer && *chunks(top.p_in__ready);
    const bool given = *chunks(top.p_out__valid) && *chunks(top.p_out__ready);
    if (given) out.write(chunks(top.p_out__data), out_bytes);
    RECORD_TAPS
    top.p_clk.set<bool>(true);
    top.step();
    if (taken && !sent++) started = cycle;
    if (given && ++received % out_beats == 0) ends.push_back(cycle);
    quiet = taken || given ? 0 : quiet + 1;
    cycle++;
    if (quiet > limit) {
      std::fprintf(stderr, "stuck after %ld cycles: %ld transfers in, %ld out\n", cycle, sent, received);
      return 3;
    }
  }
  std::FILE *times = std::fopen((folder + "/cycles.txt").c_str(), "w");
  std::fprintf(times, "%ld %ld", cycle, started);
  for (const long end : ends) std::fprintf(times, " %ld", end);
  std::fclose(times);
  return 0;
}
