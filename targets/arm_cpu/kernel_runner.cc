// Calls functions of a library of TVM kernels, without Python: what a script says, line by line.
//
//   kernel_runner LIBRARY SCRIPT
//
//   array CODE BITS FILE RANK SIZES...   one more argument: element type (DLPack code and bits), raw data, shape
//   call NAME TIMES                      calls the function with the arguments so far
//   write FILE                           writes the last argument's data
//   clear                                forgets the arguments
//
// Exit status: 0 done, 2 bad script or files, 3 the runtime reported an error.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

namespace {

constexpr int kAlignment = 64;
constexpr int kMaxRank = 8;
constexpr int kMaxArguments = 16;
constexpr int kPathBytes = 4096;

[[noreturn]] void Fail(int status, const char* what, const char* detail) {
  fprintf(stderr, "kernel_runner: %s: %s\n", what, detail);
  exit(status);
}

template <typename Cell>
Cell* CellOf(TVMFFIObject* object) {
  return reinterpret_cast<Cell*>(reinterpret_cast<char*>(object) + sizeof(TVMFFIObject));
}

void Check(int code, const char* what) {
  if (code == 0) return;
  TVMFFIObjectHandle error = nullptr;
  TVMFFIErrorMoveFromRaised(&error);
  if (error == nullptr) Fail(3, what, "unknown error");
  const TVMFFIByteArray& message = CellOf<TVMFFIErrorCell>(static_cast<TVMFFIObject*>(error))->message;
  fprintf(stderr, "kernel_runner: %s: %.*s\n", what, static_cast<int>(message.size), message.data);
  exit(3);
}

TVMFFIAny Any(int32_t type) {
  TVMFFIAny any;
  memset(&any, 0, sizeof(any));
  any.type_index = type;
  return any;
}

TVMFFIAny String(const char* text) {
  TVMFFIAny any = Any(kTVMFFIRawStr);
  any.v_c_str = text;
  return any;
}

TVMFFIObjectHandle Global(const char* name) {
  TVMFFIByteArray key = {name, strlen(name)};
  TVMFFIObjectHandle function = nullptr;
  Check(TVMFFIFunctionGetGlobal(&key, &function), name);
  if (function == nullptr) Fail(3, name, "the runtime has no such function");
  return function;
}

TVMFFIAny Call(TVMFFIObjectHandle function, TVMFFIAny* arguments, int count, const char* what) {
  TVMFFIAny result = Any(kTVMFFINone);
  Check(TVMFFIFunctionCall(function, arguments, count, &result), what);
  return result;
}

struct Argument {
  DLTensor tensor;
  int64_t shape[kMaxRank];
  size_t bytes;
};

Argument arguments[kMaxArguments];
int argument_count = 0;

void ReadArray(FILE* script) {
  if (argument_count == kMaxArguments) Fail(2, "array", "too many arguments");
  Argument& argument = arguments[argument_count++];
  int code, bits, rank;
  char path[kPathBytes];
  if (fscanf(script, "%d %d %4095s %d", &code, &bits, path, &rank) != 4 || rank < 0 || rank > kMaxRank) {
    Fail(2, "array", "expected CODE BITS FILE RANK SIZES");
  }
  argument.bytes = static_cast<size_t>(bits / 8);
  for (int i = 0; i < rank; ++i) {
    long long size;
    if (fscanf(script, "%lld", &size) != 1 || size < 0) Fail(2, "array", "bad size");
    argument.shape[i] = size;
    argument.bytes *= static_cast<size_t>(size);
  }
  memset(&argument.tensor, 0, sizeof(DLTensor));
  argument.tensor.data = aligned_alloc(kAlignment, (argument.bytes + kAlignment) / kAlignment * kAlignment);
  argument.tensor.device = DLDevice{kDLCPU, 0};
  argument.tensor.ndim = rank;
  argument.tensor.dtype = DLDataType{static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
  argument.tensor.shape = argument.shape;
  FILE* file = fopen(path, "rb");
  if (file == nullptr || argument.tensor.data == nullptr) Fail(2, "cannot read", path);
  if (fread(argument.tensor.data, 1, argument.bytes, file) != argument.bytes) Fail(2, "cut short", path);
  fclose(file);
}

void CallFunction(FILE* script, const TVMFFIAny& library) {
  char name[kPathBytes];
  int times;
  if (fscanf(script, "%4095s %d", name, &times) != 2) Fail(2, "call", "expected NAME TIMES");
  TVMFFIAny query[] = {library, String(name), Any(kTVMFFIBool)};
  query[2].v_int64 = 1;
  TVMFFIAny found = Call(Global("ffi.ModuleGetFunction"), query, 3, name);
  if (found.type_index != kTVMFFIFunction) Fail(3, name, "the library has no such function");
  TVMFFIAny values[kMaxArguments];
  for (int i = 0; i < argument_count; ++i) {
    values[i] = Any(kTVMFFIDLTensorPtr);
    values[i].v_ptr = &arguments[i].tensor;
  }
  for (int i = 0; i < times; ++i) Call(found.v_obj, values, argument_count, name);
}

void WriteLast(FILE* script) {
  char path[kPathBytes];
  if (fscanf(script, "%4095s", path) != 1 || argument_count == 0) Fail(2, "write", "expected FILE and an argument");
  const Argument& argument = arguments[argument_count - 1];
  FILE* file = fopen(path, "wb");
  if (file == nullptr || fwrite(argument.tensor.data, 1, argument.bytes, file) != argument.bytes || fclose(file) != 0) {
    Fail(2, "cannot write", path);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) Fail(2, "usage", "LIBRARY SCRIPT");
  TVMFFIAny path = String(argv[1]);
  TVMFFIAny library = Call(Global("ffi.ModuleLoadFromFile"), &path, 1, argv[1]);
  FILE* script = fopen(argv[2], "r");
  if (script == nullptr) Fail(2, "cannot read", argv[2]);
  char word[16];
  while (fscanf(script, "%15s", word) == 1) {
    if (strcmp(word, "array") == 0) {
      ReadArray(script);
    } else if (strcmp(word, "call") == 0) {
      CallFunction(script, library);
    } else if (strcmp(word, "write") == 0) {
      WriteLast(script);
    } else if (strcmp(word, "clear") == 0) {
      while (argument_count > 0) free(arguments[--argument_count].tensor.data);
    } else {
      Fail(2, "unknown word", word);
    }
  }
  fflush(stdout);
  _exit(0);  // skips the runtime's tear-down of its thread pool
}
