// Runs a compiled model without Python: loads the library, feeds .npy files, writes .npy files.
//
//   runner LIBRARY OUTPUT_FOLDER [--function NAME] [--repeat N] [--times FILE] [--trace FILE ROLES] INPUT_0.npy ...
//
// Inputs are given in the order of the model's inputs; output K is written to OUTPUT_FOLDER/output_K.npy.
// --function   call this function of the library; "main" by default.
// --repeat N   after one warm-up call, time N calls; prints "best_us B mean_us M".
// --times      after that, N more calls (at least one) in which every call of a kernel is timed; FILE gets one
//              line "NAME US" for each, in order, with its best time in microseconds.
// --trace      after that, one more call whose kernel calls are recorded. ROLES has one line a kernel,
//              "NAME INPUTS": only these kernels are recorded, and of them the first INPUTS arguments and the
//              last one, the output. FILE gets, for each call in order, the text line "call NAME INPUTS\n"
//              followed by INPUTS + 1 arrays in .npy format, one after the other. The inputs are those
//              before the call, the output is the one after it.
//
// Exit status: 0 done, 2 bad arguments or files, 3 the model's runtime reported an error.
//
// Uses only the C interface of tvm-ffi and no C++ standard library, so that any C++17 compiler builds it in
// a second, also for another machine.
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

namespace {

constexpr int kAlignment = 64;
constexpr int kMaxRank = 16;
constexpr int kNameBytes = 256;
constexpr int kHeaderBytes = 1024;

[[noreturn]] void Fail(int status, const char* what, const char* detail) {
  fprintf(stderr, "runner: %s: %s\n", what, detail);
  exit(status);
}

void* Allocate(size_t bytes) {
  void* memory = aligned_alloc(kAlignment, (bytes + kAlignment) / kAlignment * kAlignment);
  if (memory == nullptr) Fail(2, "out of memory", strerror(errno));
  return memory;
}

// ---- tvm-ffi -------------------------------------------------------------------------------------------

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
  fprintf(stderr, "runner: %s: %.*s\n", what, static_cast<int>(message.size), message.data);
  exit(3);
}

TVMFFIAny None() {
  TVMFFIAny any;
  memset(&any, 0, sizeof(any));
  return any;
}

TVMFFIAny Int(int64_t value) {
  TVMFFIAny any = None();
  any.type_index = kTVMFFIInt;
  any.v_int64 = value;
  return any;
}

TVMFFIAny Bool(bool value) {
  TVMFFIAny any = Int(value);
  any.type_index = kTVMFFIBool;
  return any;
}

TVMFFIAny String(const char* text) {
  TVMFFIAny any = None();
  any.type_index = kTVMFFIRawStr;
  any.v_c_str = text;
  return any;
}

TVMFFIAny Object(TVMFFIObjectHandle handle) {
  TVMFFIAny any = None();
  any.v_obj = static_cast<TVMFFIObject*>(handle);
  any.type_index = any.v_obj->type_index;
  return any;
}

void Release(TVMFFIAny* any) {
  if (any->type_index >= kTVMFFIStaticObjectBegin) TVMFFIObjectDecRef(any->v_obj);
  *any = None();
}

TVMFFIAny Call(TVMFFIObjectHandle function, TVMFFIAny* arguments, int count, const char* what) {
  TVMFFIAny result = None();
  Check(TVMFFIFunctionCall(function, arguments, count, &result), what);
  return result;
}

TVMFFIObjectHandle Global(const char* name) {
  TVMFFIByteArray key = {name, strlen(name)};
  TVMFFIObjectHandle function = nullptr;
  Check(TVMFFIFunctionGetGlobal(&key, &function), name);
  if (function == nullptr) Fail(3, name, "the runtime has no such function");
  return function;
}

TVMFFIObjectHandle Method(const TVMFFIAny& module, const char* name) {
  TVMFFIAny arguments[] = {module, String(name), Bool(true)};
  TVMFFIAny found = Call(Global("ffi.ModuleGetFunction"), arguments, 3, name);
  if (found.type_index != kTVMFFIFunction) Fail(3, name, "the library has no such function");
  return found.v_obj;
}

// ---- arrays --------------------------------------------------------------------------------------------

size_t CountOf(const DLTensor& tensor) {
  size_t count = 1;
  for (int i = 0; i < tensor.ndim; ++i) count *= static_cast<size_t>(tensor.shape[i]);
  return count;
}

size_t BytesOf(const DLTensor& tensor) { return CountOf(tensor) * (tensor.dtype.bits / 8); }

bool IsCompact(const DLTensor& tensor) {
  if (tensor.strides == nullptr) return true;
  int64_t expected = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

char KindOf(DLDataType type) {
  if (type.lanes == 1 && type.bits >= 8 && type.bits % 8 == 0) {
    if (type.code == kDLInt) return 'i';
    if (type.code == kDLUInt) return 'u';
    if (type.code == kDLFloat) return 'f';
    if (type.code == kDLBool) return 'b';
  }
  Fail(2, "unsupported element type", "only booleans, integers and IEEE floats fit an .npy file");
}

void WriteArray(FILE* file, const DLTensor& tensor) {
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

DLDataType TypeOf(const char* header, const char* path) {
  const char* at = strstr(header, "'descr': '");
  if (at == nullptr) Fail(2, path, "no 'descr' in the .npy header");
  at += strlen("'descr': '");
  if (*at == '>') Fail(2, path, "big-endian arrays are not supported");
  int bytes = atoi(at + 2);
  int code = at[1] == 'i' ? kDLInt : at[1] == 'u' ? kDLUInt : at[1] == 'f' ? kDLFloat : at[1] == 'b' ? kDLBool : -1;
  if (code < 0 || bytes < 1 || bytes > 8) Fail(2, path, "unsupported element type");
  return DLDataType{static_cast<uint8_t>(code), static_cast<uint8_t>(bytes * 8), 1};
}

int ShapeOf(const char* header, int64_t* shape, const char* path) {
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

void ReadHeader(FILE* file, char* header, const char* path) {
  unsigned char start[10];
  if (fread(start, 1, 10, file) != 10 || memcmp(start, "\x93NUMPY\x01", 7) != 0) Fail(2, path, "not an .npy 1.0 file");
  size_t length = start[8] | start[9] << 8;
  if (length >= kHeaderBytes) Fail(2, path, "the .npy header is too long");
  if (fread(header, 1, length, file) != length) Fail(2, path, "the .npy header is cut short");
  header[length] = 0;
  if (strstr(header, "'fortran_order': False") == nullptr) Fail(2, path, "column-major arrays are not supported");
}

TVMFFIAny ReadArray(const char* path) {
  FILE* file = fopen(path, "rb");
  if (file == nullptr) Fail(2, path, strerror(errno));
  char header[kHeaderBytes];
  ReadHeader(file, header, path);
  // Lives until the process ends, as the tensor made of it does.
  DLManagedTensor* managed = static_cast<DLManagedTensor*>(Allocate(sizeof(DLManagedTensor)));
  memset(managed, 0, sizeof(*managed));
  DLTensor& tensor = managed->dl_tensor;
  tensor.shape = static_cast<int64_t*>(Allocate(kMaxRank * sizeof(int64_t)));
  tensor.ndim = ShapeOf(header, tensor.shape, path);
  tensor.dtype = TypeOf(header, path);
  tensor.device = DLDevice{kDLCPU, 0};
  tensor.data = Allocate(BytesOf(tensor));
  if (fread(tensor.data, 1, BytesOf(tensor), file) != BytesOf(tensor)) Fail(2, path, "the data is cut short");
  fclose(file);
  TVMFFIObjectHandle handle = nullptr;
  Check(TVMFFITensorFromDLPack(managed, kAlignment, 1, &handle), path);
  return Object(handle);
}

int WriteOutputs(const TVMFFIAny& value, const char* folder, int number) {
  if (value.type_index == kTVMFFIArray) {
    TVMFFISeqCell* sequence = CellOf<TVMFFISeqCell>(value.v_obj);
    for (int64_t i = 0; i < sequence->size; ++i) {
      number = WriteOutputs(static_cast<TVMFFIAny*>(sequence->data)[i], folder, number);
    }
    return number;
  }
  if (value.type_index != kTVMFFITensor) Fail(3, "unexpected result", "the model returned something that is no tensor");
  char path[4096];
  snprintf(path, sizeof(path), "%s/output_%d.npy", folder, number);
  FILE* file = fopen(path, "wb");
  if (file == nullptr) Fail(2, path, strerror(errno));
  WriteArray(file, *CellOf<DLTensor>(value.v_obj));
  if (fclose(file) != 0) Fail(2, path, strerror(errno));
  return number + 1;
}

double Microseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1e6 + now.tv_nsec * 1e-3;
}

// ---- trace ---------------------------------------------------------------------------------------------

struct Role {
  char name[kNameBytes];
  int inputs;
};

struct Trace {
  FILE* file;
  Role* roles;
  int count;
};

Trace OpenTrace(const char* path, const char* roles_path) {
  Trace trace = {fopen(path, "wb"), nullptr, 0};
  if (trace.file == nullptr) Fail(2, path, strerror(errno));
  FILE* roles = fopen(roles_path, "r");
  if (roles == nullptr) Fail(2, roles_path, strerror(errno));
  Role role;
  while (fscanf(roles, "%255s %d", role.name, &role.inputs) == 2) {
    trace.roles = static_cast<Role*>(realloc(trace.roles, (trace.count + 1) * sizeof(Role)));
    if (trace.roles == nullptr) Fail(2, "out of memory", roles_path);
    trace.roles[trace.count++] = role;
  }
  if (!feof(roles)) Fail(2, roles_path, "expected lines of 'NAME INPUTS'");
  fclose(roles);
  return trace;
}

bool CopyName(const TVMFFIAny& value, char* name) {
  const char* text = value.v_c_str;
  size_t length = 0;
  if (value.type_index == kTVMFFIRawStr) {
    length = strlen(text);
  } else if (value.type_index == kTVMFFISmallStr) {
    text = value.v_bytes;
    length = value.small_str_len;
  } else if (value.type_index == kTVMFFIStr) {
    text = CellOf<TVMFFIByteArray>(value.v_obj)->data;
    length = CellOf<TVMFFIByteArray>(value.v_obj)->size;
  }
  if (length == 0 || length >= kNameBytes) return false;
  memcpy(name, text, length);
  name[length] = 0;
  return true;
}

const Role* FindRole(const Trace& trace, const char* name) {
  for (int i = 0; i < trace.count; ++i) {
    if (strcmp(trace.roles[i].name, name) == 0) return &trace.roles[i];
  }
  return nullptr;
}

void WriteArgument(FILE* file, const TVMFFIAny& value) {
  if (value.type_index == kTVMFFITensor) {
    WriteArray(file, *CellOf<DLTensor>(value.v_obj));
  } else if (value.type_index == kTVMFFIDLTensorPtr) {
    WriteArray(file, *static_cast<DLTensor*>(value.v_ptr));
  } else {
    Fail(3, "cannot trace a kernel", "an argument is no tensor");
  }
}

// Called before and after every call as (function, name, before, result, argument...). Inputs are written
// before the call, because a kernel may work in place; the output after it.
int Instrument(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result) {
  const Trace& trace = *static_cast<Trace*>(self);
  *result = None();
  char name[kNameBytes];
  if (count < 5 || !CopyName(arguments[1], name)) return 0;
  const Role* role = FindRole(trace, name);
  if (role == nullptr) return 0;
  if (arguments[2].v_int64 == 0) {
    WriteArgument(trace.file, arguments[count - 1]);
    return 0;
  }
  if (role->inputs >= count - 4) Fail(2, name, "the roles file gives it more inputs than it has arguments");
  fprintf(trace.file, "call %s %d\n", name, role->inputs);
  for (int i = 0; i < role->inputs; ++i) WriteArgument(trace.file, arguments[4 + i]);
  return 0;
}

// ---- times ---------------------------------------------------------------------------------------------

struct TimedCall {
  char name[kNameBytes];
  double best;
};

struct Times {
  TimedCall* calls;
  int capacity;
  int next;
  double start;
};

// Called like Instrument; keeps the best time of the call at each position of the sequence.
int TimeCall(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result) {
  double now = Microseconds();
  Times& times = *static_cast<Times*>(self);
  *result = None();
  char name[kNameBytes];
  if (count < 4 || !CopyName(arguments[1], name)) return 0;
  if (arguments[2].v_int64 != 0) {
    times.start = Microseconds();
    return 0;
  }
  if (times.next == times.capacity) {
    times.capacity = times.capacity * 2 + 64;
    times.calls = static_cast<TimedCall*>(realloc(times.calls, times.capacity * sizeof(TimedCall)));
    if (times.calls == nullptr) Fail(2, "out of memory", name);
    for (int i = times.next; i < times.capacity; ++i) times.calls[i].best = 1e300;
  }
  TimedCall& call = times.calls[times.next++];
  memcpy(call.name, name, kNameBytes);
  if (now - times.start < call.best) call.best = now - times.start;
  return 0;
}

void Install(void* state, TVMFFISafeCallType callback, const TVMFFIAny& machine) {
  TVMFFIObjectHandle instrument = nullptr;
  Check(TVMFFIFunctionCreate(state, callback, nullptr, &instrument), "set_instrument");
  TVMFFIAny argument = Object(instrument);
  Call(Method(machine, "set_instrument"), &argument, 1, "set_instrument");
}

// ---- main ----------------------------------------------------------------------------------------------

// Linux gives the tile registers (AMX) only to a process that asks. A refusal is no error: a model without
// AMX kernels does not need them.
void AskForTiles() {
#if defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  syscall(SYS_arch_prctl, kRequestPermission, kTileData);
#endif
}

TVMFFIAny Load(const char* path) {
  TVMFFIAny argument = String(path);
  TVMFFIAny library = Call(Global("ffi.ModuleLoadFromFile"), &argument, 1, path);
  TVMFFIAny machine = Call(Method(library, "vm_load_executable"), nullptr, 0, "vm_load_executable");
  constexpr int kPooledAllocator = 2;
  TVMFFIAny devices[] = {Int(kDLCPU), Int(0), Int(kPooledAllocator)};
  Call(Method(machine, "vm_initialization"), devices, 3, "vm_initialization");
  return machine;
}

TVMFFIAny Measure(TVMFFIObjectHandle function, TVMFFIAny* inputs, int count, int repeat) {
  double best = 1e300, total = 0;
  TVMFFIAny result = Call(function, inputs, count, "main");
  for (int i = 0; i < repeat; ++i) {
    Release(&result);
    double start = Microseconds();
    result = Call(function, inputs, count, "main");
    double elapsed = Microseconds() - start;
    total += elapsed;
    if (elapsed < best) best = elapsed;
  }
  if (repeat > 0) printf("best_us %.3f mean_us %.3f\n", best, total / repeat);
  return result;
}

void MeasureCalls(const char* path, TVMFFIObjectHandle function, TVMFFIAny* inputs, int count, int repeat,
                  const TVMFFIAny& machine) {
  Times times = {nullptr, 0, 0, 0};
  Install(&times, TimeCall, machine);
  for (int i = 0; i < (repeat > 0 ? repeat : 1); ++i) {
    times.next = 0;
    TVMFFIAny result = Call(function, inputs, count, "main");
    Release(&result);
  }
  FILE* file = fopen(path, "w");
  if (file == nullptr) Fail(2, path, strerror(errno));
  for (int i = 0; i < times.next; ++i) fprintf(file, "%s %.3f\n", times.calls[i].name, times.calls[i].best);
  if (fclose(file) != 0) Fail(2, path, strerror(errno));
}

struct Options {
  const char* function;
  int repeat;
  const char* times;
  const char* trace;
  const char* roles;
  int first_input;
};

Options Parse(int argc, char** argv) {
  const char* usage = "LIBRARY OUTPUT_FOLDER [--function NAME] [--repeat N] [--times FILE] [--trace FILE ROLES] INPUT.npy ...";
  Options options = {"main", 0, nullptr, nullptr, nullptr, 3};
  if (argc < 3) Fail(2, "usage", usage);
  while (options.first_input < argc && strncmp(argv[options.first_input], "--", 2) == 0) {
    int at = options.first_input;
    if (strcmp(argv[at], "--function") == 0 && at + 1 < argc) {
      options.function = argv[at + 1];
      options.first_input += 2;
    } else if (strcmp(argv[at], "--repeat") == 0 && at + 1 < argc) {
      options.repeat = atoi(argv[at + 1]);
      options.first_input += 2;
    } else if (strcmp(argv[at], "--times") == 0 && at + 1 < argc) {
      options.times = argv[at + 1];
      options.first_input += 2;
    } else if (strcmp(argv[at], "--trace") == 0 && at + 2 < argc) {
      options.trace = argv[at + 1];
      options.roles = argv[at + 2];
      options.first_input += 3;
    } else {
      Fail(2, "usage", usage);
    }
  }
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  Options options = Parse(argc, argv);
  AskForTiles();
  TVMFFIAny machine = Load(argv[1]);
  TVMFFIObjectHandle function = Method(machine, options.function);
  int count = argc - options.first_input;
  TVMFFIAny* inputs = static_cast<TVMFFIAny*>(Allocate((count + 1) * sizeof(TVMFFIAny)));
  for (int i = 0; i < count; ++i) inputs[i] = ReadArray(argv[options.first_input + i]);
  TVMFFIAny result = Measure(function, inputs, count, options.repeat);
  if (options.times != nullptr) MeasureCalls(options.times, function, inputs, count, options.repeat, machine);
  if (options.trace != nullptr) {
    Trace trace = OpenTrace(options.trace, options.roles);
    Install(&trace, Instrument, machine);
    Release(&result);
    result = Call(function, inputs, count, "main");
    if (fclose(trace.file) != 0) Fail(2, options.trace, strerror(errno));
  }
  WriteOutputs(result, argv[2], 0);
  fflush(stdout);
  _exit(0);  // skips the runtime's tear-down of its thread pool, which has nothing left to say
}
