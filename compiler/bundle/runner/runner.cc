// Runs a compiled model without Python: loads the library, feeds .npy files, writes .npy files.
//
//   runner LIBRARY OUTPUT_FOLDER [--device cuda] [--function NAME] [--repeat N] [--times FILE] [--trace FILE ROLES]
//       INPUT_0.npy ...
//
// Inputs are given in the order of the model's inputs; output K is written to OUTPUT_FOLDER/output_K.npy.
// --device     run on the first CUDA device; libtvm_runtime_cuda.so lies beside the runner, and libcudart.so.13 and the
//              driver are found by the system. Inputs are copied there once, times include waiting for the device.
// --function   call this function of the library; "main" by default.
// --repeat N   after one warm-up call, time N calls; prints "best_us B mean_us M".
// --times      after that, N more calls (at least one) in which every call of a kernel is timed; FILE gets one
//              line "NAME US" for each, in order, with its best time in microseconds.
// --trace      after that, one more call whose kernel calls are recorded. ROLES has one line a kernel,
//              "NAME INPUTS": only these kernels are recorded, and of them the first INPUTS arguments and the
//              last one, the output. FILE gets, for each call in order, the text line "call NAME INPUTS\n"
//              followed by INPUTS + 1 arrays in .npy format, one after the other. The inputs are those
//              before the call, the output is the one after it. With --device, the first call is recorded: the
//              following ones launch a graph. Only an emulated device can be recorded.
//
// Exit status: 0 done, 2 bad arguments or files, 3 the model's runtime reported an error.
//
// It is the instrument that bundles are verified with; programs of your own use bitwright_runtime.h.
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "npy.h"
#include "tvm_calls.h"

namespace {

using npy::Fail;
using tvm_calls::CellOf;
using tvm_calls::Int;
using tvm_calls::Message;
using tvm_calls::None;
using tvm_calls::Object;
using tvm_calls::Release;
using tvm_calls::String;

constexpr int kNameBytes = 256;

int device = kDLCPU;

// Ends the process with the runtime's message unless the call succeeded.
void Must(bool succeeded, const Message& message) {
  if (succeeded) return;
  fprintf(stderr, "runner: %s\n", message.text);
  exit(3);
}

TVMFFIAny Call(TVMFFIObjectHandle function, TVMFFIAny* arguments, int count, const char* what) {
  Message message;
  TVMFFIAny result;
  Must(tvm_calls::Call(function, arguments, count, &result, what, &message), message);
  return result;
}

TVMFFIObjectHandle Method(const TVMFFIAny& module, const char* name) {
  Message message;
  TVMFFIObjectHandle function = nullptr;
  Must(tvm_calls::Method(module, name, &function, &message), message);
  return function;
}

// ---- devices -------------------------------------------------------------------------------------------

void Wait() {
  Message message;
  if (device != kDLCPU) Must(tvm_calls::Wait(device, &message), message);
}

// Lets `use` see a tensor whose data is in the processor's memory.
template <typename Use>
void OnHost(const TVMFFIAny& value, const Use& use) {
  if (value.type_index != kTVMFFITensor) return use(*static_cast<DLTensor*>(value.v_ptr));
  const DLTensor& tensor = *CellOf<DLTensor>(value.v_obj);
  if (tensor.device.device_type == kDLCPU) return use(tensor);
  Message message;
  TVMFFIAny copy;
  Must(tvm_calls::CopyTensor(value, kDLCPU, &copy, &message), message);
  use(*CellOf<DLTensor>(copy.v_obj));
  Release(&copy);
}

TVMFFIAny ReadArray(const char* path) {
  // Lives until the process ends, as the tensor made of it does.
  DLManagedTensor* managed = static_cast<DLManagedTensor*>(npy::Allocate(sizeof(DLManagedTensor)));
  memset(managed, 0, sizeof(*managed));
  npy::Read(path, &managed->dl_tensor);
  Message message;
  TVMFFIObjectHandle handle = nullptr;
  int code = TVMFFITensorFromDLPack(managed, npy::kAlignment, 1, &handle);
  Must(tvm_calls::Succeeded(code, path, &message), message);
  if (device == kDLCPU) return Object(handle);
  TVMFFIAny copy;
  Must(tvm_calls::CopyTensor(Object(handle), device, &copy, &message), message);
  return copy;
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
  OnHost(value, [&](const DLTensor& tensor) { npy::WriteOutput(folder, number, tensor); });
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
  int (*capturing)();
};

Trace OpenTrace(const char* path, const char* roles_path) {
  // An emulated device says when kernels are captured into a graph, which executes none of them.
  Trace trace = {fopen(path, "wb"), nullptr, 0,
                 reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "cudaEmulatedIsCapturing"))};
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
  if (value.type_index != kTVMFFITensor && value.type_index != kTVMFFIDLTensorPtr) {
    Fail(3, "cannot trace a kernel", "an argument is no tensor");
  }
  OnHost(value, [&](const DLTensor& tensor) { npy::Write(file, tensor); });
}

// Called before and after every call as (function, name, before, result, argument...). Inputs are written
// before the call, because a kernel may work in place; the output after it.
int Instrument(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result) {
  const Trace& trace = *static_cast<Trace*>(self);
  *result = None();
  char name[kNameBytes];
  if (trace.file == nullptr || count < 5 || !CopyName(arguments[1], name)) return 0;
  const Role* role = FindRole(trace, name);
  if (role == nullptr || (trace.capturing != nullptr && trace.capturing())) return 0;
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
  Wait();
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
  Message message;
  int code = TVMFFIFunctionCreate(state, callback, nullptr, &instrument);
  Must(tvm_calls::Succeeded(code, "set_instrument", &message), message);
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
  Message message;
  TVMFFIAny argument = String(path), library, machine;
  Must(tvm_calls::CallGlobal("ffi.ModuleLoadFromFile", &argument, 1, &library, path, &message), message);
  Must(tvm_calls::MakeMachine(library, &machine, &message, device), message);
  return machine;
}

TVMFFIAny Measure(TVMFFIObjectHandle function, TVMFFIAny* inputs, int count, int repeat) {
  double best = 1e300, total = 0;
  TVMFFIAny result = Call(function, inputs, count, "main");
  Wait();
  for (int i = 0; i < repeat; ++i) {
    Release(&result);
    double start = Microseconds();
    result = Call(function, inputs, count, "main");
    Wait();
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

// Makes a call whose kernel calls are recorded.
TVMFFIAny RecordCalls(const char* path, const char* roles, TVMFFIObjectHandle function, TVMFFIAny* inputs, int count,
                      const TVMFFIAny& machine) {
  static Trace trace;  // outlives this call, as the instrument does
  trace = OpenTrace(path, roles);
  Install(&trace, Instrument, machine);
  TVMFFIAny result = Call(function, inputs, count, "main");
  if (fclose(trace.file) != 0) Fail(2, path, strerror(errno));
  trace.file = nullptr;
  return result;
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
  const char* usage =
      "LIBRARY OUTPUT_FOLDER [--device cuda] [--function NAME] [--repeat N] [--times FILE] [--trace FILE ROLES] "
      "INPUT.npy ...";
  Options options = {"main", 0, nullptr, nullptr, nullptr, 3};
  if (argc < 3) Fail(2, "usage", usage);
  while (options.first_input < argc && strncmp(argv[options.first_input], "--", 2) == 0) {
    int at = options.first_input;
    if (strcmp(argv[at], "--device") == 0 && at + 1 < argc && strcmp(argv[at + 1], "cuda") == 0) {
      device = kDLCUDA;
      options.first_input += 2;
    } else if (strcmp(argv[at], "--function") == 0 && at + 1 < argc) {
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
  Message message;
  Must(tvm_calls::LoadDevice(device, &message), message);
  TVMFFIAny machine = Load(argv[1]);
  TVMFFIObjectHandle function = Method(machine, options.function);
  int count = argc - options.first_input;
  TVMFFIAny* inputs = static_cast<TVMFFIAny*>(npy::Allocate((count + 1) * sizeof(TVMFFIAny)));
  for (int i = 0; i < count; ++i) inputs[i] = ReadArray(argv[options.first_input + i]);
  const bool records = options.trace != nullptr;
  // On a device the first call executes the kernels and captures them into a graph; later ones launch that.
  if (records && device != kDLCPU) {
    TVMFFIAny first = RecordCalls(options.trace, options.roles, function, inputs, count, machine);
    Release(&first);
  }
  TVMFFIAny result = Measure(function, inputs, count, options.repeat);
  if (options.times != nullptr) MeasureCalls(options.times, function, inputs, count, options.repeat, machine);
  if (records && device == kDLCPU) {
    Release(&result);
    result = RecordCalls(options.trace, options.roles, function, inputs, count, machine);
  }
  WriteOutputs(result, argv[2], 0);
  fflush(stdout);
  _exit(0);  // skips the runtime's tear-down of its thread pool, which has nothing left to say
}
