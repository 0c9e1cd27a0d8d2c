// The C interface of bitwright_runtime.h on top of TVM's runtime. No exceptions and no C++ standard library.
#define BW_NO_CXX_WRAPPER
#include "bitwright_runtime.h"

#include <dlpack/dlpack.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "model_text.h"
#include "tvm_calls.h"

namespace {

using model_text::Dim;
using model_text::Function;
using model_text::Port;
using model_text::Text;
using tvm_calls::Message;

constexpr size_t kAlignment = 64;
constexpr int kPathBytes = 4096;
constexpr long kLargestText = 1 << 26;
constexpr int kMostThreads = 1024;

thread_local char last_error[1200] = "no error";

__attribute__((format(printf, 2, 3))) bw_status Fail(bw_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof(last_error), format, arguments);
  va_end(arguments);
  return status;
}

bw_status Fail(const Message& message) { return Fail(BW_ERROR_RUNTIME, "%s", message.text); }

// A block of memory that grows as needed.
struct Memory {
  void* data;
  size_t size;

  bool Reserve(size_t bytes) {
    if (bytes <= size) return true;
    void* grown = aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    if (grown == nullptr) return false;
    free(data);
    data = grown;
    size = bytes;
    return true;
  }
};

// ---- libraries -------------------------------------------------------------------------------------------

// A loaded library, shared by all handles of one folder so that its weights are in memory once.
struct Library {
  char* path;
  uint32_t sum;  // another file may have taken the path's place
  TVMFFIAny module;
  int handles;
  Library* next;
};

pthread_mutex_t libraries_lock = PTHREAD_MUTEX_INITIALIZER;
Library* libraries = nullptr;

bool LoadModule(const char* path, TVMFFIAny* module, Message* message) {
  TVMFFIAny argument = tvm_calls::String(path);
  return tvm_calls::CallGlobal("ffi.ModuleLoadFromFile", &argument, 1, module, path, message);
}

bool LoadEmbedded(const bw_embedded& embedded, TVMFFIAny* module, Message* message) {
  embedded.register_symbols();
  TVMFFIAny argument = tvm_calls::String(embedded.prefix);
  return tvm_calls::CallGlobal("ffi.SystemLib", &argument, 1, module, embedded.prefix, message);
}

bw_status AddLibrary(const char* path, uint32_t sum, const bw_embedded* embedded, Library** library) {
  Message message;
  Library* added = static_cast<Library*>(calloc(1, sizeof(Library)));
  char* copy = strdup(path);
  if (added == nullptr || copy == nullptr) {
    free(added);
    free(copy);
    return Fail(BW_ERROR_MEMORY, "out of memory");
  }
  bool loaded = embedded != nullptr ? LoadEmbedded(*embedded, &added->module, &message)
                                    : LoadModule(path, &added->module, &message);
  if (!loaded) {
    free(added);
    free(copy);
    return Fail(message);
  }
  added->path = copy;
  added->sum = sum;
  added->handles = 1;
  added->next = libraries;
  *library = libraries = added;
  return BW_OK;
}

// Returns the library of a path (of a prefix if it is linked into the program), loading it for the first handle.
bw_status AcquireLibrary(const char* path, uint32_t sum, const bw_embedded* embedded, Library** library) {
  pthread_mutex_lock(&libraries_lock);
  bw_status status = BW_OK;
  *library = libraries;
  while (*library != nullptr && (strcmp((*library)->path, path) != 0 || (*library)->sum != sum)) {
    *library = (*library)->next;
  }
  if (*library != nullptr) {
    ++(*library)->handles;
  } else {
    status = AddLibrary(path, sum, embedded, library);
  }
  pthread_mutex_unlock(&libraries_lock);
  return status;
}

void ReleaseLibrary(Library* library) {
  if (library == nullptr) return;
  pthread_mutex_lock(&libraries_lock);
  if (--library->handles == 0) {
    Library** at = &libraries;
    while (*at != library) at = &(*at)->next;
    *at = library->next;
    tvm_calls::Release(&library->module);
    free(library->path);
    free(library);
  }
  pthread_mutex_unlock(&libraries_lock);
}

// ---- files -----------------------------------------------------------------------------------------------

bw_status ReadText(const char* path, char** content) {
  FILE* file = fopen(path, "rb");
  if (file == nullptr) {
    return Fail(BW_ERROR_BUNDLE, "%s: %s (give the 'lib' folder of a bundle)", path, strerror(errno));
  }
  bool sought = fseek(file, 0, SEEK_END) == 0;
  long size = sought ? ftell(file) : -1;
  if (size < 0 || size > kLargestText) {
    fclose(file);
    return Fail(BW_ERROR_BUNDLE, "%s: no file of this size is expected", path);
  }
  rewind(file);
  *content = static_cast<char*>(calloc(static_cast<size_t>(size) + 1, 1));
  size_t got = *content == nullptr ? 0 : fread(*content, 1, static_cast<size_t>(size), file);
  fclose(file);
  if (*content == nullptr) return Fail(BW_ERROR_MEMORY, "out of memory");
  return got == static_cast<size_t>(size) ? BW_OK : Fail(BW_ERROR_BUNDLE, "%s: cannot be read", path);
}

// Compares size and Adler-32 checksum: a library that is cut short would end the process when it is mapped.
bw_status CheckLibrary(const char* path, const Text& text) {
  FILE* file = fopen(path, "rb");
  if (file == nullptr) return Fail(BW_ERROR_BUNDLE, "%s: %s", path, strerror(errno));
  uint32_t low = 1, high = 0;
  int64_t bytes = 0;
  static thread_local unsigned char block[1 << 14];
  while (size_t got = fread(block, 1, sizeof(block), file)) {
    bytes += static_cast<int64_t>(got);
    for (size_t start = 0; start < got; start += 4096) {  // few enough that the sums stay below 2^32
      size_t end = start + 4096 < got ? start + 4096 : got;
      for (size_t i = start; i < end; ++i) high += low += block[i];
      low %= 65521;
      high %= 65521;
    }
  }
  fclose(file);
  if (bytes != text.library_bytes) {
    return Fail(BW_ERROR_BUNDLE, "%s: has %lld bytes, expected %lld", path, static_cast<long long>(bytes),
                static_cast<long long>(text.library_bytes));
  }
  if ((high << 16 | low) != text.library_sum) return Fail(BW_ERROR_BUNDLE, "%s: was changed or damaged", path);
  return BW_OK;
}

// ---- this machine ----------------------------------------------------------------------------------------

bool HasWord(const char* line, const char* word) {
  size_t length = strlen(word);
  for (const char* at = strstr(line, word); at != nullptr; at = strstr(at + 1, word)) {
    bool starts = at == line || at[-1] == ' ' || at[-1] == '\t';
    if (starts && (at[length] == ' ' || at[length] == '\n' || at[length] == 0)) return true;
  }
  return false;
}

bw_status CheckFlags(const Text& text) {
  static thread_local char line[1 << 14];
  FILE* file = text.flag_count > 0 ? fopen("/proc/cpuinfo", "r") : nullptr;
  if (file == nullptr) return BW_OK;
  bool found = false;
  while (!found && fgets(line, sizeof(line), file) != nullptr) found = strncmp(line, "flags", 5) == 0;
  fclose(file);
  for (int i = 0; found && i < text.flag_count; ++i) {
    if (!HasWord(line, text.flags[i])) {
      return Fail(BW_ERROR_MACHINE, "the model was compiled for a processor with '%s', which this one lacks",
                  text.flags[i]);
    }
  }
  return BW_OK;
}

// Linux gives the tile registers (AMX) only to a process that asks.
bw_status AskForTiles(const Text& text) {
  bool wanted = false;
  for (int i = 0; i < text.flag_count; ++i) wanted = wanted || strcmp(text.flags[i], "amx_tile") == 0;
#if defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (wanted && syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
    return Fail(BW_ERROR_MACHINE, "Linux does not grant the tile registers (AMX) to this process: %s", strerror(errno));
  }
#endif
  return BW_OK;
}

// The bundle's number of threads, but no more than the processors that this process may use.
int DefaultThreads(int wanted) {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  int count = sched_getaffinity(0, sizeof(allowed), &allowed) == 0 ? CPU_COUNT(&allowed) : wanted;
  return count < wanted ? count : wanted;
}

// TVM binds the threads of every pool to the first cores, where those of two handles would meet.
void LeaveThreadsUnbound() { setenv("TVM_BIND_THREADS", "0", 0); }

// Settles the number of threads for kernels that this thread launches. The list of cores says how many; the threads are
// not bound to them.
bool ConfigureThreads(int threads, Message* message) {
  static thread_local int configured = 0;
  if (configured == threads) return true;
  TVMFFIAny cores[kMostThreads];
  char names[kMostThreads][8];
  for (int i = 0; i < threads; ++i) {
    snprintf(names[i], sizeof(names[i]), "%d", i);
    cores[i] = tvm_calls::String(names[i]);
  }
  constexpr int kShareAllCores = -3;
  const char* name = "runtime.config_threadpool";
  TVMFFIAny arguments[] = {tvm_calls::Int(kShareAllCores), tvm_calls::Int(threads), tvm_calls::None()}, nothing;
  if (!tvm_calls::CallGlobal("ffi.Array", cores, threads, &arguments[2], name, message)) return false;
  bool done = tvm_calls::CallGlobal(name, arguments, 3, &nothing, name, message);
  tvm_calls::Release(&arguments[2]);
  if (done) configured = threads;
  return done;
}

}  // namespace

// ---- handles ---------------------------------------------------------------------------------------------

struct Input {
  Memory memory;
  int64_t shape[BW_MAX_RANK];
  DLManagedTensor managed;
  TVMFFIAny tensor;
};

struct Result {
  TVMFFIAny tensor;  // if it is what the model returned, else
  Memory memory;     // what was cut and joined from it
  bw_tensor view;
};

struct bw_model {
  Text text;
  Library* library;
  TVMFFIAny machine;
  TVMFFIObjectHandle* functions;
  int threads;
  Input* inputs;
  Input* states;
  Result* results;
  bool has_results;
  char busy;
};

namespace {

void DropResults(bw_model* model) {
  for (int i = 0; i < model->text.output_count; ++i) tvm_calls::Release(&model->results[i].tensor);
  model->has_results = false;
}

size_t BytesOf(const int64_t* shape, int rank, size_t item) {
  for (int i = 0; i < rank; ++i) item *= static_cast<size_t>(shape[i]);
  return item;
}

// Lets TVM see the memory of an input, of the shape that it has now.
bw_status ViewInput(const Port& port, Input* input) {
  DLTensor& tensor = input->managed.dl_tensor;
  memset(&input->managed, 0, sizeof(input->managed));
  tensor.data = input->memory.data;
  tensor.device = DLDevice{kDLCPU, 0};
  tensor.ndim = port.rank;
  tensor.dtype = DLDataType{port.type->code, port.type->bits, 1};
  tensor.shape = input->shape;
  TVMFFIObjectHandle handle = nullptr;
  Message message;
  int code = TVMFFITensorFromDLPack(&input->managed, static_cast<int32_t>(kAlignment), 1, &handle);
  if (!tvm_calls::Succeeded(code, port.name, &message)) return Fail(message);
  input->tensor = tvm_calls::Object(handle);
  return BW_OK;
}

// Makes the caches, filled with zeros, which the handle keeps from call to call.
bw_status MakeStates(bw_model* model) {
  const Text& text = model->text;
  model->states = static_cast<Input*>(calloc(static_cast<size_t>(text.state_count) + 1, sizeof(Input)));
  if (model->states == nullptr) return Fail(BW_ERROR_MEMORY, "out of memory");
  for (int i = 0; i < text.state_count; ++i) {
    const Port& port = text.states[i];
    Input* state = &model->states[i];
    memcpy(state->shape, port.dims, sizeof(state->shape));
    size_t bytes = BytesOf(port.dims, port.rank, port.type->bits / 8u);
    if (!state->memory.Reserve(bytes)) return Fail(BW_ERROR_MEMORY, "no %zu bytes for cache '%s'", bytes, port.name);
    memset(state->memory.data, 0, bytes);
    bw_status status = ViewInput(port, state);
    if (status != BW_OK) return status;
  }
  return BW_OK;
}

bw_status Prepare(bw_model* model) {
  const Text& text = model->text;
  Message message;
  bw_status made = MakeStates(model);
  if (made != BW_OK) return made;
  model->inputs = static_cast<Input*>(calloc(static_cast<size_t>(text.input_count) + 1, sizeof(Input)));
  model->results = static_cast<Result*>(calloc(static_cast<size_t>(text.output_count) + 1, sizeof(Result)));
  size_t functions = static_cast<size_t>(text.function_count) + 1;
  model->functions = static_cast<TVMFFIObjectHandle*>(calloc(functions, sizeof(TVMFFIObjectHandle)));
  if (model->inputs == nullptr || model->results == nullptr || model->functions == nullptr) {
    return Fail(BW_ERROR_MEMORY, "out of memory");
  }
  model->threads = DefaultThreads(text.threads);
  const int device = text.cuda ? kDLCUDA : kDLCPU;
  if (!tvm_calls::MakeMachine(model->library->module, &model->machine, &message, device)) return Fail(message);
  for (int i = 0; i < text.function_count; ++i) {
    if (!tvm_calls::Method(model->machine, text.functions[i].name, &model->functions[i], &message)) {
      return Fail(message);
    }
  }
  return BW_OK;
}

bw_status ParseText(const char* content, const char* where, Text* text) {
  int line = 0;
  const char* wrong = model_text::Parse(content, text, &line);
  if (wrong != nullptr) return Fail(BW_ERROR_BUNDLE, "%s, line %d: %s", where, line, wrong);
  if (text->onnxruntime > 0) {
    return Fail(BW_ERROR_BUNDLE,
                "%s: %d parts of this model run in ONNX Runtime, which only the Python package can combine with "
                "compiled parts (bitwright.Bundle.open(...).run(...))",
                where, text->onnxruntime);
  }
  Message message;  // the library of a model for a device cannot be loaded without the device's runtime
  if (text->cuda && !tvm_calls::LoadDevice(kDLCUDA, &message)) return Fail(message);
  bw_status status = CheckFlags(*text);
  return status == BW_OK ? AskForTiles(*text) : status;
}

bw_status OpenFolder(const char* folder, bw_model* model) {
  char path[kPathBytes];
  int length = snprintf(path, sizeof(path), "%s/model.txt", folder);
  if (length < 0 || length >= kPathBytes) return Fail(BW_ERROR_ARGUMENT, "the folder's name is too long");
  char* content = nullptr;
  bw_status status = ReadText(path, &content);
  if (status == BW_OK) status = ParseText(content, path, &model->text);
  free(content);
  if (status != BW_OK) return status;
  if (model->text.library == nullptr) return Fail(BW_ERROR_BUNDLE, "%s: names no library", path);
  length = snprintf(path, sizeof(path), "%s/%s", folder, model->text.library);
  if (length < 0 || length >= kPathBytes) return Fail(BW_ERROR_ARGUMENT, "the folder's name is too long");
  status = CheckLibrary(path, model->text);
  if (status != BW_OK) return status;
  char* real = realpath(path, nullptr);
  if (real == nullptr) return Fail(BW_ERROR_BUNDLE, "%s: %s", path, strerror(errno));
  status = AcquireLibrary(real, model->text.library_sum, nullptr, &model->library);
  free(real);
  return status == BW_OK ? Prepare(model) : status;
}

bw_status OpenEmbedded(const bw_embedded& embedded, bw_model* model) {
  bw_status status = ParseText(embedded.text, "the linked model", &model->text);
  if (status == BW_OK) status = AcquireLibrary(embedded.prefix, 0, &embedded, &model->library);
  return status == BW_OK ? Prepare(model) : status;
}

template <typename Opener, typename Source>
bw_status Open(Opener opener, Source source, bw_model** model) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, LeaveThreadsUnbound);
  bw_model* opened = static_cast<bw_model*>(calloc(1, sizeof(bw_model)));
  if (opened == nullptr) return Fail(BW_ERROR_MEMORY, "out of memory");
  bw_status status = opener(source, opened);
  if (status == BW_OK) {
    *model = opened;
  } else {
    bw_close(opened);
  }
  return status;
}

bw_status GetPort(const bw_model* model, const Port* ports, int count, int32_t index, bw_port* port) {
  if (model == nullptr || port == nullptr) return Fail(BW_ERROR_ARGUMENT, "a null pointer");
  if (index < 0 || index >= count) return Fail(BW_ERROR_ARGUMENT, "there is no port %d: there are %d", index, count);
  const Port& found = ports[index];
  memset(port, 0, sizeof(*port));
  port->name = found.name;
  port->dtype = found.type->dtype;
  port->rank = found.rank;
  for (int i = 0; i < found.rank; ++i) {
    bool free_size = found.dims[i] < 0;
    port->dims[i] = free_size ? -1 : found.dims[i];
    port->dim_names[i] = free_size ? model->text.dims[-1 - found.dims[i]].name : nullptr;
  }
  return BW_OK;
}

// ---- shapes ----------------------------------------------------------------------------------------------

bw_status MatchInput(const Text& text, const Port& port, const bw_tensor& input, int64_t* sizes) {
  if (input.dtype != port.type->dtype) {
    return Fail(BW_ERROR_INPUT, "input '%s': expected elements of type %s", port.name, port.type->name);
  }
  if (input.rank != port.rank) {
    return Fail(BW_ERROR_INPUT, "input '%s': expected %d dimensions, got %d", port.name, port.rank, input.rank);
  }
  size_t bytes = port.type->bits / 8u;
  for (int i = 0; i < port.rank; ++i) {
    int64_t size = input.shape[i], dim = -1 - port.dims[i];
    if (dim >= 0 && sizes[dim] == 0) sizes[dim] = size;
    int64_t wanted = dim >= 0 ? sizes[dim] : port.dims[i];
    if (size != wanted || size < 1) {
      return Fail(BW_ERROR_INPUT, "input '%s': dimension %d%s%s is %lld, expected %lld", port.name, i,
                  dim >= 0 ? ", " : "", dim >= 0 ? text.dims[dim].name : "", static_cast<long long>(size),
                  static_cast<long long>(wanted < 1 ? 1 : wanted));
    }
    if (__builtin_mul_overflow(bytes, static_cast<size_t>(size), &bytes)) bytes = SIZE_MAX;
  }
  if (input.data == nullptr && bytes > 0) return Fail(BW_ERROR_INPUT, "input '%s': no data", port.name);
  if (input.bytes != bytes) {
    return Fail(BW_ERROR_INPUT, "input '%s': this shape takes %zu bytes, got %zu", port.name, bytes, input.bytes);
  }
  return BW_OK;
}

// Refuses a call that the caches have no room for.
bw_status CheckRoom(const Text& text, const bw_tensor* inputs, const int64_t* sizes) {
  if (text.capacity == 0) return BW_OK;
  int32_t past = 0;
  memcpy(&past, inputs[text.past_input].data, sizeof(past));
  int64_t added = sizes[text.length_dim];
  if (past >= 0 && past + added <= text.capacity) return BW_OK;
  return Fail(BW_ERROR_INPUT, "%lld positions behind %d do not fit caches of %lld", static_cast<long long>(added), past,
              static_cast<long long>(text.capacity));
}

// Finds the smallest function that holds the sizes; of a dimension of any size, one for just this size comes first.
bw_status ChooseFunction(const Text& text, const int64_t* sizes, int* chosen) {
  double least = 0;
  *chosen = -1;
  for (int d = 0; d < text.dim_count; ++d) {
    const Dim& dim = text.dims[d];
    if (dim.largest == 0 || sizes[d] <= dim.largest) continue;
    return Fail(BW_ERROR_INPUT, "%s=%lld is larger than %lld, the largest that is served", dim.name,
                static_cast<long long>(sizes[d]), static_cast<long long>(dim.largest));
  }
  for (int f = 0; f < text.function_count; ++f) {
    bool holds = true;
    double volume = 1;
    for (int d = 0; d < text.dim_count; ++d) {
      const Dim& dim = text.dims[d];
      int64_t size = text.functions[f].sizes[d];
      bool free_size = dim.any && size == 0;
      holds = holds && (dim.loop || free_size || (dim.any ? sizes[d] == size : sizes[d] <= size));
      volume *= free_size ? static_cast<double>(sizes[d]) + 0.5 : static_cast<double>(size);
    }
    if (holds && (*chosen < 0 || volume < least)) {
      *chosen = f;
      least = volume;
    }
  }
  if (*chosen >= 0) return BW_OK;
  for (int d = 0; d < text.dim_count; ++d) {
    const Dim& dim = text.dims[d];
    if (dim.loop || dim.any || sizes[d] <= dim.sizes[dim.count - 1]) continue;
    char buckets[512] = "";
    for (int i = 0; i < dim.count; ++i) {
      size_t used = strlen(buckets);
      snprintf(buckets + used, sizeof(buckets) - used, i == 0 ? "%lld" : ", %lld", static_cast<long long>(dim.sizes[i]));
    }
    return Fail(BW_ERROR_INPUT, "%s=%lld is larger than the largest bucket; %s has %s", dim.name,
                static_cast<long long>(sizes[d]), dim.name, buckets);
  }
  return Fail(BW_ERROR_BUNDLE, "no function of the library holds these sizes");
}

// Copies the block that two row-major arrays share; `from_at` and `to_at` are its first index on each axis.
void CopyBlock(char* to, const int64_t* to_shape, const int64_t* to_at, const char* from, const int64_t* from_shape,
               const int64_t* from_at, const int64_t* extent, int rank, size_t item) {
  if (rank == 0) {
    memcpy(to, from, item);
    return;
  }
  size_t to_step = BytesOf(to_shape + 1, rank - 1, item), from_step = BytesOf(from_shape + 1, rank - 1, item);
  if (to_step == from_step && memcmp(to_shape + 1, extent + 1, sizeof(int64_t) * static_cast<size_t>(rank - 1)) == 0 &&
      memcmp(from_shape + 1, extent + 1, sizeof(int64_t) * static_cast<size_t>(rank - 1)) == 0) {
    memcpy(to + static_cast<size_t>(to_at[0]) * to_step, from + static_cast<size_t>(from_at[0]) * from_step,
           static_cast<size_t>(extent[0]) * to_step);
    return;
  }
  for (int64_t i = 0; i < extent[0]; ++i) {
    CopyBlock(to + static_cast<size_t>(to_at[0] + i) * to_step, to_shape + 1, to_at + 1,
              from + static_cast<size_t>(from_at[0] + i) * from_step, from_shape + 1, from_at + 1, extent + 1, rank - 1,
              item);
  }
}

template <typename Value>
void FillWith(void* data, size_t bytes, double pad) {
  Value value = static_cast<Value>(pad);
  Value* values = static_cast<Value*>(data);
  for (size_t i = 0; i < bytes / sizeof(Value); ++i) values[i] = value;
}

void Fill(void* data, size_t bytes, const model_text::Type& type, double pad) {
  if (pad == 0) {
    memset(data, 0, bytes);
    return;
  }
  switch (type.dtype) {
    case BW_BOOL: return FillWith<bool>(data, bytes, pad);
    case BW_INT8: return FillWith<int8_t>(data, bytes, pad);
    case BW_UINT8: return FillWith<uint8_t>(data, bytes, pad);
    case BW_INT16: return FillWith<int16_t>(data, bytes, pad);
    case BW_UINT16: return FillWith<uint16_t>(data, bytes, pad);
    case BW_INT32: return FillWith<int32_t>(data, bytes, pad);
    case BW_UINT32: return FillWith<uint32_t>(data, bytes, pad);
    case BW_INT64: return FillWith<int64_t>(data, bytes, pad);
    case BW_UINT64: return FillWith<uint64_t>(data, bytes, pad);
    case BW_FLOAT16: return FillWith<uint16_t>(data, bytes, pad);  // the bundle holds the bits of the value
    case BW_FLOAT32: return FillWith<float>(data, bytes, pad);
    case BW_FLOAT64: return FillWith<double>(data, bytes, pad);
  }
}

// ---- one call --------------------------------------------------------------------------------------------

// Copies one element of the looped dimension of an input, padded to the function's sizes.
bw_status PlaceInput(const Text& text, const Port& port, const bw_tensor& given, const Function& function,
                     int64_t element, Input* input) {
  int64_t from_at[BW_MAX_RANK] = {0}, to_at[BW_MAX_RANK] = {0}, extent[BW_MAX_RANK] = {0};
  bool padded = false;
  for (int i = 0; i < port.rank; ++i) {
    int64_t dim = -1 - port.dims[i];
    bool looped = dim >= 0 && text.dims[dim].loop;
    bool free_size = dim >= 0 && function.sizes[dim] == 0;
    input->shape[i] = free_size ? given.shape[i] : dim >= 0 ? function.sizes[dim] : port.dims[i];
    extent[i] = looped ? 1 : given.shape[i];
    from_at[i] = looped ? element : 0;
    padded = padded || extent[i] != input->shape[i];
  }
  size_t item = port.type->bits / 8u, bytes = BytesOf(input->shape, port.rank, item);
  if (!input->memory.Reserve(bytes > 0 ? bytes : 1)) return Fail(BW_ERROR_MEMORY, "out of memory");
  if (padded) Fill(input->memory.data, bytes, *port.type, port.pad);
  CopyBlock(static_cast<char*>(input->memory.data), input->shape, to_at, static_cast<const char*>(given.data),
            given.shape, from_at, extent, port.rank, item);
  return ViewInput(port, input);
}

// Returns output number `index` of what the model returned, or null if it is something else.
TVMFFIAny* OutputOf(TVMFFIAny* returned, int index, int count) {
  TVMFFIAny* found = returned;
  if (returned->type_index == kTVMFFIArray) {
    TVMFFISeqCell* sequence = tvm_calls::CellOf<TVMFFISeqCell>(returned->v_obj);
    if (sequence->size != count) return nullptr;
    found = static_cast<TVMFFIAny*>(sequence->data) + index;
  } else if (count != 1) {
    return nullptr;
  }
  return found->type_index == kTVMFFITensor ? found : nullptr;
}

// Keeps an output as it is, or copies its true part to its place among those of the other elements.
bw_status TakeOutput(const Text& text, const Port& port, const int64_t* sizes, int64_t element, const TVMFFIAny& any,
                     Result* result) {
  const DLTensor& tensor = *tvm_calls::CellOf<DLTensor>(any.v_obj);
  bw_tensor& view = result->view;
  int64_t to_at[BW_MAX_RANK] = {0}, from_at[BW_MAX_RANK] = {0}, extent[BW_MAX_RANK] = {0};
  if (tensor.ndim != port.rank || tensor.dtype.bits != port.type->bits || tensor.dtype.code != port.type->code) {
    return Fail(BW_ERROR_RUNTIME, "output '%s' has another type than the bundle says", port.name);
  }
  bool whole = true;
  view.dtype = port.type->dtype;
  view.rank = port.rank;
  for (int i = 0; i < port.rank; ++i) {
    int64_t dim = -1 - port.dims[i];
    bool looped = dim >= 0 && text.dims[dim].loop;
    view.shape[i] = dim >= 0 ? sizes[dim] : port.dims[i];
    extent[i] = looped ? 1 : view.shape[i];
    to_at[i] = looped ? element : 0;
    if (tensor.shape[i] < extent[i]) {
      return Fail(BW_ERROR_RUNTIME, "output '%s' has another shape than the bundle says", port.name);
    }
    whole = whole && view.shape[i] == tensor.shape[i];
  }
  view.bytes = BytesOf(view.shape, view.rank, port.type->bits / 8u);
  char* data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  if (whole) {
    TVMFFIObjectIncRef(any.v_obj);
    result->tensor = any;
    view.data = data;
    return BW_OK;
  }
  if (!result->memory.Reserve(view.bytes > 0 ? view.bytes : 1)) return Fail(BW_ERROR_MEMORY, "out of memory");
  view.data = result->memory.data;
  CopyBlock(static_cast<char*>(view.data), view.shape, to_at, data, tensor.shape, from_at, extent, port.rank,
            port.type->bits / 8u);
  return BW_OK;
}

// Takes an output, from a device's memory by a copy.
bw_status TakeFromDevice(const Text& text, int index, const int64_t* sizes, int64_t element, const TVMFFIAny& any,
                         Result* result) {
  const Port& port = text.outputs[index];
  if (!text.cuda) return TakeOutput(text, port, sizes, element, any, result);
  Message message;
  TVMFFIAny copy;
  if (!tvm_calls::CopyTensor(any, kDLCPU, &copy, &message)) return Fail(message);
  bw_status status = TakeOutput(text, port, sizes, element, copy, result);
  tvm_calls::Release(&copy);
  return status;
}

bw_status Invoke(bw_model* model, int function, const int64_t* sizes, int64_t element) {
  const Text& text = model->text;
  Message message;
  const int given = text.input_count, all = given + text.state_count;
  TVMFFIAny* arguments = static_cast<TVMFFIAny*>(calloc(static_cast<size_t>(all) + 1, sizeof(TVMFFIAny)));
  if (arguments == nullptr) return Fail(BW_ERROR_MEMORY, "out of memory");
  bool done = true;
  for (int i = given; i < all; ++i) arguments[i] = model->states[i - given].tensor;
  for (int i = 0; i < given && done; ++i) {
    arguments[i] = model->inputs[i].tensor;
    if (text.cuda) done = tvm_calls::CopyTensor(model->inputs[i].tensor, kDLCUDA, &arguments[i], &message);
  }
  TVMFFIAny returned = tvm_calls::None();
  const char* name = text.functions[function].name;
  done = done && tvm_calls::Call(model->functions[function], arguments, all, &returned, name, &message);
  for (int i = 0; i < text.input_count && text.cuda; ++i) tvm_calls::Release(&arguments[i]);
  free(arguments);
  if (!done) return Fail(message);
  bw_status status = BW_OK;
  for (int i = 0; i < text.output_count && status == BW_OK; ++i) {
    TVMFFIAny* output = OutputOf(&returned, i, text.output_count + text.state_count);
    status = output == nullptr ? Fail(BW_ERROR_RUNTIME, "the model returned something that is no tensor")
                               : TakeFromDevice(text, i, sizes, element, *output, &model->results[i]);
  }
  tvm_calls::Release(&returned);
  return status;
}

bw_status RunElement(bw_model* model, const bw_tensor* inputs, int function, const int64_t* sizes, int64_t element) {
  const Text& text = model->text;
  bw_status status = BW_OK;
  for (int i = 0; i < text.input_count && status == BW_OK; ++i) {
    status = PlaceInput(text, text.inputs[i], inputs[i], text.functions[function], element, &model->inputs[i]);
  }
  if (status == BW_OK) status = Invoke(model, function, sizes, element);
  for (int i = 0; i < text.input_count; ++i) tvm_calls::Release(&model->inputs[i].tensor);
  return status;
}

bw_status Run(bw_model* model, const bw_tensor* inputs, int64_t* sizes) {
  const Text& text = model->text;
  Message message;
  for (int i = 0; i < text.input_count; ++i) {
    bw_status status = MatchInput(text, text.inputs[i], inputs[i], sizes);
    if (status != BW_OK) return status;
  }
  int function = 0;
  bw_status room = CheckRoom(text, inputs, sizes);
  if (room != BW_OK) return room;
  bw_status status = ChooseFunction(text, sizes, &function);
  if (status != BW_OK) return status;
  if (!ConfigureThreads(model->threads, &message)) return Fail(message);
  int64_t elements = 1;
  for (int d = 0; d < text.dim_count; ++d) {
    if (text.dims[d].loop) elements = sizes[d];
  }
  DropResults(model);
  for (int64_t k = 0; k < elements && status == BW_OK; ++k) status = RunElement(model, inputs, function, sizes, k);
  model->has_results = status == BW_OK;
  return status;
}

}  // namespace

// ---- the interface ---------------------------------------------------------------------------------------

extern "C" {

int32_t bw_abi_version(void) { return BW_ABI_VERSION; }

const char* bw_last_error(void) { return last_error; }

bw_status bw_open(const char* folder, bw_model** model) {
  if (folder == nullptr || model == nullptr) return Fail(BW_ERROR_ARGUMENT, "a null pointer");
  *model = nullptr;
  return Open(OpenFolder, folder, model);
}

bw_status bw_open_embedded(const bw_embedded* embedded, bw_model** model) {
  if (embedded == nullptr || model == nullptr) return Fail(BW_ERROR_ARGUMENT, "a null pointer");
  *model = nullptr;
  return Open([](const bw_embedded* source, bw_model* opened) { return OpenEmbedded(*source, opened); }, embedded, model);
}

void bw_close(bw_model* model) {
  if (model == nullptr) return;
  if (model->results != nullptr) DropResults(model);
  for (int i = 0; model->functions != nullptr && i < model->text.function_count; ++i) {
    if (model->functions[i] != nullptr) TVMFFIObjectDecRef(model->functions[i]);
  }
  tvm_calls::Release(&model->machine);
  for (int i = 0; model->states != nullptr && i < model->text.state_count; ++i) {
    tvm_calls::Release(&model->states[i].tensor);
    free(model->states[i].memory.data);
  }
  for (int i = 0; model->inputs != nullptr && i < model->text.input_count; ++i) free(model->inputs[i].memory.data);
  for (int i = 0; model->results != nullptr && i < model->text.output_count; ++i) free(model->results[i].memory.data);
  free(model->functions);
  free(model->inputs);
  free(model->states);
  free(model->results);
  ReleaseLibrary(model->library);
  model_text::Free(&model->text);
  free(model);
}

int32_t bw_input_count(const bw_model* model) { return model == nullptr ? 0 : model->text.input_count; }

int32_t bw_output_count(const bw_model* model) { return model == nullptr ? 0 : model->text.output_count; }

bw_status bw_input(const bw_model* model, int32_t index, bw_port* port) {
  if (model == nullptr) return Fail(BW_ERROR_ARGUMENT, "a null pointer");
  return GetPort(model, model->text.inputs, model->text.input_count, index, port);
}

bw_status bw_output(const bw_model* model, int32_t index, bw_port* port) {
  if (model == nullptr) return Fail(BW_ERROR_ARGUMENT, "a null pointer");
  return GetPort(model, model->text.outputs, model->text.output_count, index, port);
}

bw_status bw_set_threads(bw_model* model, int32_t threads) {
  if (model == nullptr) return Fail(BW_ERROR_ARGUMENT, "a null pointer");
  if (threads < 1 || threads > kMostThreads) {
    return Fail(BW_ERROR_ARGUMENT, "%d is no number of threads from 1 to %d", threads, kMostThreads);
  }
  model->threads = threads;
  return BW_OK;
}

bw_status bw_run(bw_model* model, const bw_tensor* inputs, int32_t count) {
  if (model == nullptr || (inputs == nullptr && count > 0)) return Fail(BW_ERROR_ARGUMENT, "a null pointer");
  if (count != model->text.input_count) {
    return Fail(BW_ERROR_INPUT, "the model has %d inputs, got %d", model->text.input_count, count);
  }
  if (__atomic_test_and_set(&model->busy, __ATOMIC_ACQUIRE)) {
    return Fail(BW_ERROR_ARGUMENT, "the handle is in use by another thread: open one for each thread");
  }
  int64_t* sizes = static_cast<int64_t*>(calloc(static_cast<size_t>(model->text.dim_count) + 1, sizeof(int64_t)));
  bw_status status = sizes == nullptr ? Fail(BW_ERROR_MEMORY, "out of memory") : Run(model, inputs, sizes);
  free(sizes);
  __atomic_clear(&model->busy, __ATOMIC_RELEASE);
  return status;
}

bw_status bw_result(const bw_model* model, int32_t index, bw_tensor* tensor) {
  if (model == nullptr || tensor == nullptr) return Fail(BW_ERROR_ARGUMENT, "a null pointer");
  if (index < 0 || index >= model->text.output_count) {
    return Fail(BW_ERROR_ARGUMENT, "there is no output %d: there are %d", index, model->text.output_count);
  }
  if (!model->has_results) return Fail(BW_ERROR_ARGUMENT, "there is no result: bw_run has not succeeded");
  *tensor = model->results[index].view;
  return BW_OK;
}

}  // extern "C"
