// What the kernels ask of the processor. TensorIR calls these functions; on a GPU they are the PTX below. The CPU
// emulation defines BITWRIGHT_DEVICE before this text and brings functions of the same names and meaning.
#ifndef BITWRIGHT_DEVICE
#define BITWRIGHT_DEVICE
#define BW_DEVICE static __device__ __forceinline__

BW_DEVICE unsigned bw_shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

BW_DEVICE void bw_declare() {}

// TensorIR shrinks a buffer to the elements that it sees: naming both ends keeps all of it.
BW_DEVICE void bw_keep(const void*, const void*) {}

// Asynchronous copies from global to shared memory; zeros are written where `valid` is 0.
BW_DEVICE void bw_copy_async_16(void* to, const void* from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(bw_shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
BW_DEVICE void bw_copy_async_8(void* to, const void* from, int valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(bw_shared_address(to)), "l"(from),
               "r"(valid ? 8 : 0)
               : "memory");
}
BW_DEVICE void bw_copy_async_4(void* to, const void* from, int valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(bw_shared_address(to)), "l"(from),
               "r"(valid ? 4 : 0)
               : "memory");
}
BW_DEVICE void bw_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
BW_DEVICE void bw_wait_0() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }
BW_DEVICE void bw_wait_1() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }
BW_DEVICE void bw_wait_2() { asm volatile("cp.async.wait_group 2;" ::: "memory"); }
BW_DEVICE void bw_wait_3() { asm volatile("cp.async.wait_group 3;" ::: "memory"); }
BW_DEVICE void bw_barrier() { __syncthreads(); }

// Four 8 x 16 byte matrices: lane i gives the address of row i % 8 of matrix i / 8 and gets, of each matrix, the four
// bytes at column 4 * (i % 4) of row i / 4.
BW_DEVICE void bw_load_matrix_4(void* fragment, const void* row) {
  unsigned* f = static_cast<unsigned*>(fragment);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3])
               : "r"(bw_shared_address(row))
               : "memory");
}
BW_DEVICE void bw_load_matrix_2(void* fragment, const void* row) {
  unsigned* f = static_cast<unsigned*>(fragment);
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(f[0]), "=r"(f[1])
               : "r"(bw_shared_address(row))
               : "memory");
}

// d[16 x 8] += a[16 x 32] * b[8 x 32]^T in int32.
BW_DEVICE void bw_mma_s8(void* sums, const void* left, const void* right) {
  int* d = static_cast<int*>(sums);
  const unsigned *a = static_cast<const unsigned*>(left), *b = static_cast<const unsigned*>(right);
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d[16 x 8] += a[16 x 16] * b[8 x 16]^T, fp16 factors, float32 sums.
BW_DEVICE void bw_mma_f16(void* sums, const void* left, const void* right) {
  float* d = static_cast<float*>(sums);
  const unsigned *a = static_cast<const unsigned*>(left), *b = static_cast<const unsigned*>(right);
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// A matrix of 128-byte rows in shared memory, swizzled by 128 bytes, as wgmma takes it: address, eight rows 1024 bytes
// apart, mode 1, all but the mode in units of 16 bytes.
BW_DEVICE unsigned long long bw_matrix(const void* shared) {
  return static_cast<unsigned long long>((bw_shared_address(shared) & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 |
         1ull << 62;
}
// Copies that this thread has waited for become visible to the tensor cores behind the next barrier.
BW_DEVICE void bw_publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
BW_DEVICE int bw_dp4a(int a, int b, int sum) { return __dp4a(a, b, sum); }

BW_DEVICE int bw_load_word(const void* from) { return *static_cast<const int*>(from); }
BW_DEVICE void bw_store_word(void* to, int value) { *static_cast<int*>(to) = value; }
BW_DEVICE float bw_load_float(const void* from) { return *static_cast<const float*>(from); }
BW_DEVICE void bw_store_float(void* to, float value) { *static_cast<float*>(to) = value; }
BW_DEVICE void bw_move_16(void* to, const void* from) {
  *static_cast<int4*>(to) = *static_cast<const int4*>(from);
}
BW_DEVICE void bw_move_8(void* to, const void* from) {
  *static_cast<int2*>(to) = *static_cast<const int2*>(from);
}
BW_DEVICE void bw_move_4(void* to, const void* from) { *static_cast<int*>(to) = *static_cast<const int*>(from); }
BW_DEVICE void bw_move_2(void* to, const void* from) {
  *static_cast<short*>(to) = *static_cast<const short*>(from);
}
BW_DEVICE void bw_move_1(void* to, const void* from) { *static_cast<char*>(to) = *static_cast<const char*>(from); }
BW_DEVICE void bw_store_bytes_2(void* to, int low, int high) {
  *static_cast<unsigned short*>(to) = static_cast<unsigned short>((low & 255) | (high & 255) << 8);
}
BW_DEVICE void bw_store_floats_2(void* to, float low, float high) {
  *static_cast<float2*>(to) = make_float2(low, high);
}
BW_DEVICE void bw_store_half(void* to, float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  *static_cast<unsigned short*>(to) = bits;
}

// Epilogues; every operation rounds by itself, whatever the compiler's flags say.
BW_DEVICE int bw_requantize(int total, float multiplier, float low, float high, int zero_point) {
  const float rounded = rintf(__fmul_rn(__int2float_rn(total), multiplier));
  return __float2int_rn(fminf(fmaxf(rounded, low), high)) + zero_point;
}
BW_DEVICE float bw_scaled(int total, float multiplier, float bias) {
  return __fmaf_rn(__int2float_rn(total), multiplier, bias);
}
BW_DEVICE float bw_fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
BW_DEVICE float bw_multiply(float a, float b) { return __fmul_rn(a, b); }
BW_DEVICE float bw_divide(float a, float b) { return __fdiv_rn(a, b); }
// The larger value; NaN if one of them is.
BW_DEVICE float bw_largest(float a, float b) { return a > b || a != a ? a : b; }
BW_DEVICE float bw_magnitude(float a) { return fabsf(a); }
// What an activation of a group is multiplied by before it is rounded, and what a step of the result is worth.
BW_DEVICE float bw_group_factor(float top, float least) { return top >= least ? __fdiv_rn(127.0f, top) : 0.0f; }
BW_DEVICE float bw_group_scale(float top) { return isfinite(top) ? __fdiv_rn(top, 127.0f) : __int_as_float(0x7fffffff); }
BW_DEVICE int bw_round(float a) { return __float2int_rn(a); }
BW_DEVICE float bw_shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
BW_DEVICE int bw_shuffle_xor_int(int value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
#endif
