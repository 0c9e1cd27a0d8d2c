// CUDA kernels on a CPU: the source that TVM writes for nvcc, compiled by the host's C++ compiler behind this text.
//
// Every thread of a block is a fiber with its own stack. A fiber runs until it needs others: the block's barrier, or
// an operation of the whole warp (mma, ldmatrix, shuffles), which is done once all 32 lanes have arrived. Asynchronous
// copies happen at the latest allowed moment (the wait) or at the earliest (the issue), warps run in rising or falling
// order: a kernel that lacks a wait or a barrier gives other results under one of these policies.
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <math.h>
#include <algorithm>
#include <vector>

#define BITWRIGHT_DEVICE
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static
#define __align__(bytes) alignas(bytes)

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef _Float16 half;
struct bw_dim { unsigned x, y, z; };
#define BW_VECTOR(type, name)                                                                                  \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                                     \
  struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };                                               \
  static inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                      \
  static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
BW_VECTOR(signed char, char)
BW_VECTOR(unsigned char, uchar)
BW_VECTOR(short, short)
BW_VECTOR(unsigned short, ushort)
BW_VECTOR(int, int)
BW_VECTOR(unsigned, uint)
BW_VECTOR(float, float)
BW_VECTOR(half, half)
struct longlong4 { long long x, y, z, w; };

static bw_dim threadIdx, blockIdx, blockDim, gridDim;
static const int warpSize = 32;
alignas(1024) static unsigned char buf_dyn_shmem[1 << 18];  // at most 228 KiB are used

namespace bw {
struct Copy { void* to; const void* from; unsigned size; bool valid; };
struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool entered = false, done = false;
  bw_dim index;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  unsigned long barriers = 0, collectives = 0;
};
struct Operands { void* out; const void* a; const void* b; int value; int other; };
struct Warp {
  Operands operands[32];
  int arrived = 0, lanes = 0, kind = 0;
  unsigned long done = 0;
};
// Four warps that multiply together; what they have issued and not waited for yet.
struct Product { void* sums; const unsigned char* left; const unsigned char* right; int columns; };
struct WarpGroup {
  std::vector<Product> issued[128];
  int arrived = 0;
  unsigned long done = 0;
};
struct Range { const unsigned char* first; size_t size; };

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static std::vector<WarpGroup> groups;
static unsigned char* stacks;
static unsigned stack_count, current, block_threads, barrier_arrived;
static unsigned long barrier_done;
static bool late_copies;
static jmp_buf scheduler;
static void (*kernel)(void**);
static void** arguments;
static std::vector<Range> ranges;
static char failure[256];
static size_t shared_size;
static const size_t STACK = 1 << 16;

static void fail(const char* what) {
  if (!failure[0]) snprintf(failure, sizeof failure, "%s (block %u,%u,%u thread %u)", what, blockIdx.x, blockIdx.y,
                            blockIdx.z, current);
}
__attribute__((noinline)) static void yield() {
  if (!_setjmp(fibers[current].resume)) _longjmp(scheduler, 1);
}
static void entry() {
  kernel(arguments);
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}
static void check_global(const void* at, size_t size) {
  const unsigned char* p = static_cast<const unsigned char*>(at);
  for (const Range& r : ranges)
    if (p >= r.first && p + size <= r.first + r.size) return;
  fail("a copy reads outside the kernel's arguments");
}
static void check_shared(const void* at, size_t size) {
  const unsigned char* p = static_cast<const unsigned char*>(at);
  if (p < buf_dyn_shmem || p + size > buf_dyn_shmem + shared_size) fail("an access outside shared memory");
  if (reinterpret_cast<uintptr_t>(p) % size) fail("an unaligned access to shared memory");
}
static void do_copy(const Copy& c) {
  if (failure[0]) return;
  if (c.valid) memcpy(c.to, c.from, c.size);
  else memset(c.to, 0, c.size);
}
static void copy_async(void* to, const void* from, unsigned size, int valid) {
  if (valid) {
    check_global(from, size);
    if (reinterpret_cast<uintptr_t>(from) % size) fail("an unaligned asynchronous copy");
  }
  check_shared(to, size);
  Copy c{to, from, size, valid != 0};
  if (late_copies) fibers[current].open.push_back(c);
  else do_copy(c);
}
static void wait_for(size_t allowed) {
  auto& groups = fibers[current].groups;
  while (groups.size() > allowed) {
    for (const Copy& c : groups.front()) do_copy(c);
    groups.erase(groups.begin());
  }
}

enum Kind { NONE, MATRIX_4, MATRIX_2, MMA_S8, MMA_F16, SHUFFLE_XOR, SHUFFLE_DOWN, SHUFFLE_FROM, VOTE };

static void load_matrix(Warp& w, int count) {
  for (int j = 0; j < count; j++)
    for (int lane = 0; lane < 32; lane++) {
      const char* row = static_cast<const char*>(w.operands[8 * j + lane / 4].a);
      memcpy(static_cast<char*>(w.operands[lane].out) + 4 * j, row + 4 * (lane % 4), 4);
    }
}
template <typename Element, typename Sum>
static void multiply(Warp& w) {
  // Fragments are four bytes of a row: row lane / 4 (+ 8), column 4 * (lane % 4) (+ 16 bytes).
  const int per = 4 / sizeof(Element), depth = 32 / sizeof(Element);
  static Element a[16][32], b[8][32];
  for (int lane = 0; lane < 32; lane++) {
    const int row = lane / 4, column = per * (lane % 4);
    const char* left = static_cast<const char*>(w.operands[lane].a);
    const char* right = static_cast<const char*>(w.operands[lane].b);
    memcpy(&a[row][column], left, 4);
    memcpy(&a[row + 8][column], left + 4, 4);
    memcpy(&a[row][column + depth / 2], left + 8, 4);
    memcpy(&a[row + 8][column + depth / 2], left + 12, 4);
    memcpy(&b[row][column], right, 4);
    memcpy(&b[row][column + depth / 2], right + 4, 4);
  }
  Sum sums[16][8];
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 8; j++) {
      Sum total = 0;
      for (int k = 0; k < depth; k++) total += static_cast<Sum>(a[i][k]) * static_cast<Sum>(b[j][k]);
      sums[i][j] = total;
    }
  for (int lane = 0; lane < 32; lane++) {
    Sum* d = static_cast<Sum*>(w.operands[lane].out);
    for (int r = 0; r < 4; r++) d[r] += sums[lane / 4 + 8 * (r / 2)][2 * (lane % 4) + r % 2];
  }
}
static void shuffle(Warp& w, int kind) {
  unsigned values[32];
  for (int lane = 0; lane < w.lanes; lane++) values[lane] = *static_cast<unsigned*>(w.operands[lane].out);
  for (int lane = 0; lane < w.lanes; lane++) {
    const int by = w.operands[lane].value, width = w.operands[lane].other, base = lane / width * width;
    int source = kind == SHUFFLE_XOR ? lane ^ by : kind == SHUFFLE_DOWN ? lane + by : base + by % width;
    if (source >= base + width || source < base || source >= w.lanes) source = lane;
    *static_cast<unsigned*>(w.operands[lane].out) = values[source];
  }
}
static void perform(Warp& w) {
  if (w.lanes != 32 && w.kind < SHUFFLE_XOR) return fail("a matrix operation in a warp of fewer than 32 threads");
  switch (w.kind) {
    case MATRIX_4: return load_matrix(w, 4);
    case MATRIX_2: return load_matrix(w, 2);
    case MMA_S8: return multiply<int8_t, int>(w);
    case MMA_F16: return multiply<_Float16, float>(w);
    case VOTE: {
      unsigned all = 0;
      for (int lane = 0; lane < w.lanes; lane++) all |= w.operands[lane].value ? 1u << lane : 0u;
      for (int lane = 0; lane < w.lanes; lane++) *static_cast<unsigned*>(w.operands[lane].out) = all;
      return;
    }
    default: return shuffle(w, w.kind);
  }
}
static void collective(int kind, void* out, const void* a = nullptr, const void* b = nullptr, int value = 0,
                       int other = 32) {
  const unsigned thread = current;
  Warp& w = warps[thread / 32];
  if (w.arrived && w.kind != kind) fail("the lanes of a warp are at different operations");
  w.kind = kind;
  w.operands[thread % 32] = {out, a, b, value, other};
  const unsigned long number = ++fibers[thread].collectives;
  if (++w.arrived == w.lanes) {
    if (!failure[0]) perform(w);
    w.arrived = 0;
    w.done = number;
  }
  while (w.done < number) yield();
}
static void barrier() {
  const unsigned long number = ++fibers[current].barriers;
  if (++barrier_arrived == block_threads) {
    barrier_arrived = 0;
    barrier_done = number;
  }
  while (barrier_done < number) yield();
}

// Element of a matrix of 128-byte rows in shared memory, as wgmma finds it: bits 4 to 6 of the address change places by
// bits 7 to 9.
static int8_t swizzled(const unsigned char* matrix, int row, int byte) {
  size_t at = static_cast<size_t>(matrix - buf_dyn_shmem) + static_cast<size_t>(row) * 128 + static_cast<size_t>(byte);
  at ^= (at >> 7 & 7) << 4;
  if (at >= shared_size) fail("wgmma reads outside shared memory");
  return static_cast<int8_t>(buf_dyn_shmem[at]);
}
static void multiply_group(const WarpGroup& g, size_t number) {
  const Product& first = g.issued[0][number];
  if (reinterpret_cast<uintptr_t>(first.left) % 1024 || reinterpret_cast<uintptr_t>(first.right) % 1024)
    return fail("a matrix of wgmma that is not aligned to 1024 bytes");
  static int8_t a[64][128], b[256][128];
  for (int row = 0; row < 64; row++)
    for (int k = 0; k < 128; k++) a[row][k] = swizzled(first.left, row, k);
  for (int row = 0; row < first.columns; row++)
    for (int k = 0; k < 128; k++) b[row][k] = swizzled(first.right, row, k);
  for (int lane = 0; lane < 128; lane++) {
    const Product& p = g.issued[lane][number];
    if (p.left != first.left || p.right != first.right) return fail("the lanes of a warp group multiply other matrices");
    int* sums = static_cast<int*>(p.sums);
    for (int r = 0; r < first.columns / 2; r++) {
      const int row = lane / 32 * 16 + lane % 32 / 4 + 8 * (r % 4 / 2), column = r / 4 * 8 + lane % 4 * 2 + r % 2;
      int total = 0;
      for (int k = 0; k < 128; k++) total += a[row][k] * b[column][k];
      sums[r] += total;
    }
  }
}
// The last of the 128 threads does what all have issued.
static void finish_group() {
  const unsigned thread = current;
  WarpGroup& g = groups[thread / 128];
  const unsigned long number = ++fibers[thread].collectives;
  if (++g.arrived == 128) {
    for (size_t i = 0; i < g.issued[0].size() && !failure[0]; i++) multiply_group(g, i);
    for (auto& issued : g.issued) issued.clear();
    g.arrived = 0;
    g.done = number;
  }
  while (g.done < number) yield();
}
static void issue_group(void* sums, const void* left, const void* right, int columns) {
  auto& issued = groups[current / 128].issued[current % 128];
  issued.push_back({sums, static_cast<const unsigned char*>(left), static_cast<const unsigned char*>(right), columns});
  if (!late_copies) finish_group();
}

// Runs one fiber until it yields; true if it ended, or came past something that it waited for.
static bool step(unsigned thread) {
  Fiber& f = fibers[thread];
  if (f.done) return false;
  const unsigned long before = f.barriers + f.collectives;
  current = thread;
  threadIdx = f.index;
  if (!_setjmp(scheduler)) {
    if (f.entered) _longjmp(f.resume, 1);
    f.entered = true;
    setcontext(&f.start);
  }
  return f.done || f.barriers + f.collectives != before;
}
static bool run_warp(unsigned warp, bool falling) {
  bool any = false, moved = true;
  while (moved && !failure[0]) {
    moved = false;
    const unsigned first = warp * 32, last = std::min(first + 32, block_threads);
    for (unsigned i = first; i < last; i++) moved |= step(falling ? last - 1 - (i - first) : i);
    any |= moved;
  }
  return any;
}
static void run_block(unsigned shared, bool falling) {
  memset(buf_dyn_shmem, 0xA5, shared);
  barrier_arrived = 0;
  barrier_done = 0;
  groups.assign(block_threads / 128, WarpGroup());
  for (unsigned w = 0; w < warps.size(); w++) {
    warps[w] = Warp();
    warps[w].lanes = static_cast<int>(std::min(32u, block_threads - 32 * w));
  }
  for (unsigned t = 0; t < block_threads; t++) {
    Fiber& f = fibers[t];
    f.entered = f.done = false;
    f.barriers = f.collectives = 0;
    f.open.clear();
    f.groups.clear();
    f.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = stacks + t * STACK;
    f.start.uc_stack.ss_size = STACK;
    f.start.uc_link = nullptr;
    makecontext(&f.start, entry, 0);
  }
  bool moved = true;
  while (moved && !failure[0]) {
    moved = false;
    const unsigned count = static_cast<unsigned>(warps.size());
    for (unsigned w = 0; w < count && !failure[0]; w++) moved |= run_warp(falling ? count - 1 - w : w, falling);
  }
  for (const Fiber& f : fibers)
    if (!f.done) return fail("not all threads reach a barrier or an operation of their warp");
}
}  // namespace bw

// Returns nothing, or what went wrong. policy: 1 copies early, 2 falling order of threads.
static const char* bw_launch(void (*kernel)(void**), void** arguments, const size_t* sizes, int count,
                             const unsigned* grid, const unsigned* block, unsigned shared, int policy) {
  using namespace bw;
  failure[0] = 0;
  bw::kernel = kernel;
  bw::arguments = arguments;
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {block[0], block[1], block[2]};
  block_threads = block[0] * block[1] * block[2];
  shared_size = shared;
  late_copies = !(policy & 1);
  if (block_threads > 1024 || shared > sizeof buf_dyn_shmem) {
    blockIdx = {0, 0, 0};
    fail("more threads or shared memory than a block can have");
    return failure;
  }
  ranges.clear();
  for (int i = 0; i < count; i++) ranges.push_back({static_cast<unsigned char*>(arguments[i]), sizes[i]});
  if (stack_count < block_threads) {
    if (stacks) munmap(stacks, stack_count * STACK);
    stacks = static_cast<unsigned char*>(mmap(nullptr, block_threads * STACK, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    stack_count = block_threads;
  }
  fibers.assign(block_threads, Fiber());
  warps.assign((block_threads + 31) / 32, Warp());
  for (unsigned z = 0; z < grid[2]; z++)
    for (unsigned y = 0; y < grid[1]; y++)
      for (unsigned x = 0; x < grid[0]; x++) {
        blockIdx = {x, y, z};
        run_block(shared, (policy & 2) != 0);
        if (failure[0]) return failure;
      }
  return nullptr;
}

// The functions of device.cuh.
static inline void bw_declare() {}
static inline void bw_keep(const void*, const void*) {}
static void bw_copy_async_16(void* to, const void* from, int valid) { bw::copy_async(to, from, 16, valid); }
static void bw_copy_async_8(void* to, const void* from, int valid) { bw::copy_async(to, from, 8, valid); }
static void bw_copy_async_4(void* to, const void* from, int valid) { bw::copy_async(to, from, 4, valid); }
static void bw_commit() {
  auto& f = bw::fibers[bw::current];
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}
static void bw_wait_0() { bw::wait_for(0); }
static void bw_wait_1() { bw::wait_for(1); }
static void bw_wait_2() { bw::wait_for(2); }
static void bw_wait_3() { bw::wait_for(3); }
static void bw_barrier() { bw::barrier(); }
static void __syncthreads() { bw::barrier(); }
static void __syncwarp(unsigned = 0) { int unused = 0; bw::collective(bw::VOTE, &unused); }
static void bw_load_matrix_4(void* fragment, const void* row) {
  bw::check_shared(row, 16);
  bw::collective(bw::MATRIX_4, fragment, row);
}
static void bw_load_matrix_2(void* fragment, const void* row) {
  if (bw::current % 32 < 16) bw::check_shared(row, 16);
  bw::collective(bw::MATRIX_2, fragment, row);
}
static void bw_mma_s8(void* d, const void* a, const void* b) { bw::collective(bw::MMA_S8, d, a, b); }
static void bw_mma_f16(void* d, const void* a, const void* b) { bw::collective(bw::MMA_F16, d, a, b); }
static void bw_wgmma_s8_64(void* d, const void* a, const void* b) { bw::issue_group(d, a, b, 64); }
static void bw_wgmma_s8_128(void* d, const void* a, const void* b) { bw::issue_group(d, a, b, 128); }
static void bw_wgmma_s8_256(void* d, const void* a, const void* b) { bw::issue_group(d, a, b, 256); }
static void bw_wgmma_wait_64(void*) { if (bw::late_copies) bw::finish_group(); }
static void bw_wgmma_wait_128(void*) { if (bw::late_copies) bw::finish_group(); }
static void bw_wgmma_wait_256(void*) { if (bw::late_copies) bw::finish_group(); }
static inline void bw_declare_wgmma_64() {}
static inline void bw_declare_wgmma_128() {}
static inline void bw_declare_wgmma_256() {}
static inline void bw_publish() {}
static inline int bw_dp4a(int a, int b, int sum) {
  int8_t x[4], y[4];
  memcpy(x, &a, 4);
  memcpy(y, &b, 4);
  return sum + x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3];
}
static inline int __dp4a(int a, int b, int sum) { return bw_dp4a(a, b, sum); }
template <typename Word>
static Word bw_word(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Word)) bw::fail("an unaligned access");
  Word word;
  memcpy(&word, from, sizeof word);
  return word;
}
template <typename Word>
static void bw_put(void* to, Word word) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Word)) bw::fail("an unaligned access");
  memcpy(to, &word, sizeof word);
}
static int bw_load_word(const void* from) { return bw_word<int>(from); }
static void bw_store_word(void* to, int value) { bw_put(to, value); }
static float bw_load_float(const void* from) { return bw_word<float>(from); }
static void bw_store_float(void* to, float value) { bw_put(to, value); }
static void bw_move_16(void* to, const void* from) { bw_put(to, bw_word<int4>(from)); }
static void bw_move_8(void* to, const void* from) { bw_put(to, bw_word<int2>(from)); }
static void bw_move_4(void* to, const void* from) { bw_put(to, bw_word<int>(from)); }
static void bw_move_2(void* to, const void* from) { bw_put(to, bw_word<short>(from)); }
static void bw_move_1(void* to, const void* from) { memcpy(to, from, 1); }
static void bw_store_bytes_2(void* to, int low, int high) {
  bw_put(to, static_cast<unsigned short>((low & 255) | (high & 255) << 8));
}
static void bw_store_floats_2(void* to, float low, float high) { bw_put(to, make_float2(low, high)); }
static void bw_store_half(void* to, float value) { bw_put(to, static_cast<_Float16>(value)); }
static inline int bw_requantize(int total, float multiplier, float low, float high, int zero_point) {
  const float rounded = rintf(static_cast<float>(total) * multiplier);
  return static_cast<int>(fminf(fmaxf(rounded, low), high)) + zero_point;
}
static inline float bw_fma(float a, float b, float c) { return fmaf(a, b, c); }
static inline float bw_scaled(int total, float multiplier, float bias) {
  return fmaf(static_cast<float>(total), multiplier, bias);
}
static inline float bw_multiply(float a, float b) { return a * b; }
static inline float bw_divide(float a, float b) { return a / b; }
static inline float bw_largest(float a, float b) { return a > b || a != a ? a : b; }
static inline float bw_magnitude(float a) { return fabsf(a); }
static inline float bw_group_factor(float top, float least) { return top >= least ? 127.0f / top : 0.0f; }
static inline float bw_group_scale(float top) { return isfinite(top) ? top / 127.0f : NAN; }
static inline int bw_round(float a) { return a == a ? static_cast<int>(rintf(a)) : 0; }
static float bw_shuffle_xor(float value, int mask) {
  bw::collective(bw::SHUFFLE_XOR, &value, nullptr, nullptr, mask);
  return value;
}
static int bw_shuffle_xor_int(int value, int mask) {
  bw::collective(bw::SHUFFLE_XOR, &value, nullptr, nullptr, mask);
  return value;
}

// What TVM's own schedules use of CUDA.
template <typename T>
static T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
  static_assert(sizeof(T) == 4, "shuffles move four bytes");
  bw::collective(bw::SHUFFLE_XOR, &value, nullptr, nullptr, mask, width);
  return value;
}
template <typename T>
static T __shfl_down_sync(unsigned, T value, int delta, int width = 32) {
  static_assert(sizeof(T) == 4, "shuffles move four bytes");
  bw::collective(bw::SHUFFLE_DOWN, &value, nullptr, nullptr, delta, width);
  return value;
}
template <typename T>
static T __shfl_sync(unsigned, T value, int lane, int width = 32) {
  static_assert(sizeof(T) == 4, "shuffles move four bytes");
  bw::collective(bw::SHUFFLE_FROM, &value, nullptr, nullptr, lane, width);
  return value;
}
static unsigned __activemask() { return 0xffffffffu; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline half __float2half_rn(float a) { return static_cast<half>(a); }
#define __expf(a) expf(a)
static inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
static inline float __ldg(const float* at) { return *at; }
template <typename T> static inline T max(T a, T b) { return a > b ? a : b; }
template <typename T> static inline T min(T a, T b) { return a < b ? a : b; }
