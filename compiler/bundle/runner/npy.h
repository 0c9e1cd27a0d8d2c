// Reading and writing .npy files in a command-line program: whatever is wrong with a file ends the process.
#pragma once

#include <dlpack/dlpack.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace npy {

constexpr int kAlignment = 64;
constexpr int kMaxRank = 16;
constexpr int kHeaderBytes = 1024;

[[noreturn]] inline void Fail(int status, const char* what, const char* detail) {
  fprintf(stderr, "error: %s: %s\n", what, detail);
  exit(status);
}

inline void* Allocate(size_t bytes) {
  void* memory = aligned_alloc(kAlignment, (bytes + kAlignment) / kAlignment * kAlignment);
  if (memory == nullptr) Fail(2, "out of memory", strerror(errno));
  return memory;
}

inline size_t CountOf(const DLTensor& tensor) {
  size_t count = 1;
  for (int i = 0; i < tensor.ndim; ++i) count *= static_cast<size_t>(tensor.shape[i]);
  return count;
}

inline size_t BytesOf(const DLTensor& tensor) { return CountOf(tensor) * (tensor.dtype.bits / 8); }

inline bool IsCompact(const DLTensor& tensor) {
  if (tensor.strides == nullptr) return true;
  int64_t expected = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

inline char KindOf(DLDataType type) {
  if (type.lanes == 1 && type.bits >= 8 && type.bits % 8 == 0) {
    if (type.code == kDLInt) return 'i';
    if (type.code == kDLUInt) return 'u';
    if (type.code == kDLFloat) return 'f';
    if (type.code == kDLBool) return 'b';
  }
  Fail(2, "unsupported element type", "only booleans, integers and IEEE floats fit an .npy file");
}

inline void Write(FILE* file, const DLTensor& tensor) {
  if (!IsCompact(tensor)) Fail(2, "cannot write an array", "it is not contiguous");
  char shape[kMaxRank * 24 + 4] = "(";
  for (int i = 0; i < tensor.ndim; ++i) {
    snprintf(shape + strlen(shape), sizeof(shape) - strlen(shape), "%lld, ", static_cast<long long>(tensor.shape[i]));
  }
  char header[kHeaderBytes];
  int bytes = tensor.dtype.bits / 8;
  int length = snprintf(header, sizeof(header), "{'descr': '%c%c%d', 'fortran_order': False, 'shape': %s), }",
                        bytes == 1 ? '|' : '<', KindOf(tensor.dtype), bytes, shape);
  int padded = (10 + length + 1 + 63) / 64 * 64 - 10;  // the data starts at a multiple of 64 bytes
  unsigned char start[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, static_cast<unsigned char>(padded & 255),
                             static_cast<unsigned char>(padded >> 8)};
  fwrite(start, 1, sizeof(start), file);
  fprintf(file, "%-*s\n", padded - 1, header);
  fwrite(static_cast<const char*>(tensor.data) + tensor.byte_offset, 1, BytesOf(tensor), file);
  if (ferror(file)) Fail(2, "cannot write an array", strerror(errno));
}

// Writes FOLDER/output_NUMBER.npy.
inline void WriteOutput(const char* folder, int number, const DLTensor& tensor) {
  char path[4096];
  snprintf(path, sizeof(path), "%s/output_%d.npy", folder, number);
  FILE* file = fopen(path, "wb");
  if (file == nullptr) Fail(2, path, strerror(errno));
  Write(file, tensor);
  if (fclose(file) != 0) Fail(2, path, strerror(errno));
}

inline DLDataType TypeOf(const char* header, const char* path) {
  const char* at = strstr(header, "'descr': '");
  if (at == nullptr) Fail(2, path, "no 'descr' in the .npy header");
  at += strlen("'descr': '");
  if (*at == '>') Fail(2, path, "big-endian arrays are not supported");
  int bytes = atoi(at + 2);
  int code = at[1] == 'i' ? kDLInt : at[1] == 'u' ? kDLUInt : at[1] == 'f' ? kDLFloat : at[1] == 'b' ? kDLBool : -1;
  if (code < 0 || bytes < 1 || bytes > 8) Fail(2, path, "unsupported element type");
  return DLDataType{static_cast<uint8_t>(code), static_cast<uint8_t>(bytes * 8), 1};
}

inline int ShapeOf(const char* header, int64_t* shape, const char* path) {
  const char* at = strstr(header, "'shape': (");
  if (at == nullptr) Fail(2, path, "no 'shape' in the .npy header");
  at += strlen("'shape': (");
  int rank = 0;
  while (*at != ')' && *at != 0) {
    char* end = nullptr;
    shape[rank] = strtoll(at, &end, 10);
    if (end == at || shape[rank] < 0 || ++rank == kMaxRank) Fail(2, path, "bad 'shape' in the .npy header");
    for (at = end; *at == ',' || *at == ' '; ++at) {
    }
  }
  return rank;
}

inline void ReadHeader(FILE* file, char* header, const char* path) {
  unsigned char start[10];
  if (fread(start, 1, 10, file) != 10 || memcmp(start, "\x93NUMPY\x01", 7) != 0) Fail(2, path, "not an .npy 1.0 file");
  size_t length = start[8] | start[9] << 8;
  if (length >= kHeaderBytes) Fail(2, path, "the .npy header is too long");
  if (fread(header, 1, length, file) != length) Fail(2, path, "the .npy header is cut short");
  header[length] = 0;
  if (strstr(header, "'fortran_order': False") == nullptr) Fail(2, path, "column-major arrays are not supported");
}

// Fills `tensor`; its memory lives until the process ends.
inline void Read(const char* path, DLTensor* tensor) {
  FILE* file = fopen(path, "rb");
  if (file == nullptr) Fail(2, path, strerror(errno));
  char header[kHeaderBytes];
  ReadHeader(file, header, path);
  memset(tensor, 0, sizeof(*tensor));
  tensor->shape = static_cast<int64_t*>(Allocate(kMaxRank * sizeof(int64_t)));
  tensor->ndim = ShapeOf(header, tensor->shape, path);
  tensor->dtype = TypeOf(header, path);
  tensor->device = DLDevice{kDLCPU, 0};
  tensor->data = Allocate(BytesOf(*tensor));
  if (fread(tensor->data, 1, BytesOf(*tensor), file) != BytesOf(*tensor)) Fail(2, path, "the data is cut short");
  fclose(file);
}

}  // namespace npy
