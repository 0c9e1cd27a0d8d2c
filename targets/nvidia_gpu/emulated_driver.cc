// The part of the CUDA driver and runtime that TVM uses, on a CPU: memory is the host's, kernels are those of a library
// that the emulation compiled from the CUDA source, streams do everything at once.
//
// It lets TVM's own runtime execute a library with GPU code: launches with their grids and arguments, storage plans and
// captured graphs are the real ones. The library of kernels is named by BITWRIGHT_EMULATED_KERNELS.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum : int { kSuccess = 0, kInvalid = 1, kNoDevice = 100, kNotFound = 500, kLaunchFailed = 719 };

using RunKernel = const char* (*)(void**, const size_t*, int, const unsigned*, const unsigned*, unsigned, int);

struct Kernel {
  RunKernel run;
  int count;
};
struct Launch {
  Kernel kernel;
  std::vector<void*> arguments;
  unsigned grid[3], block[3], shared;
};
struct Copy {
  void* to;
  const void* from;
  size_t size;
};
struct Work {
  bool is_copy;
  Launch launch;
  Copy copy;
};
using Graph = std::vector<Work>;

std::map<uintptr_t, size_t> blocks;
std::string failure = "no error";
Graph* captured = nullptr;
void* capturing_stream = nullptr;
int last_error = kSuccess;

int Failed(int code, const std::string& what) {
  failure = what;
  fprintf(stderr, "emulated GPU: %s\n", what.c_str());
  return last_error = code;
}

// Bytes from an address to the end of the block it lies in; 0 for memory that was not allocated here.
size_t Room(const void* at) {
  auto found = blocks.upper_bound(reinterpret_cast<uintptr_t>(at));
  if (found == blocks.begin()) return 0;
  --found;
  const uintptr_t inside = reinterpret_cast<uintptr_t>(at) - found->first;
  return inside < found->second ? found->second - inside : 0;
}

int Run(const Launch& launch) {
  std::vector<void*> arguments = launch.arguments;
  std::vector<size_t> sizes;
  for (void* argument : arguments) sizes.push_back(Room(argument));
  const char* policy = getenv("BITWRIGHT_EMULATION_POLICY");
  const char* said = launch.kernel.run(arguments.data(), sizes.data(), launch.kernel.count, launch.grid, launch.block,
                                       launch.shared, policy ? atoi(policy) : 0);
  return said && *said ? Failed(kLaunchFailed, said) : kSuccess;
}

int Do(const Work& work) {
  if (!work.is_copy) return Run(work.launch);
  memmove(work.copy.to, work.copy.from, work.copy.size);
  return kSuccess;
}

int Submit(Work work, void* stream) {
  if (captured == nullptr || stream != capturing_stream) return Do(work);
  captured->push_back(work);
  return kSuccess;
}

int Allocate(void** at, size_t size) {
  constexpr size_t kAlignment = 256;
  *at = aligned_alloc(kAlignment, (size + kAlignment) / kAlignment * kAlignment);
  if (*at == nullptr) return Failed(kInvalid, "out of memory");
  blocks[reinterpret_cast<uintptr_t>(*at)] = size;
  return kSuccess;
}

int Release(void* at) {
  blocks.erase(reinterpret_cast<uintptr_t>(at));
  free(at);
  return kSuccess;
}

}  // namespace

struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};

EXPORT int cuModuleLoadData(void** module, const void*) {
  const char* path = getenv("BITWRIGHT_EMULATED_KERNELS");
  if (path == nullptr) return Failed(kNoDevice, "no library of emulated kernels is named");
  *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  return *module ? kSuccess : Failed(kNoDevice, dlerror());
}
EXPORT int cuModuleUnload(void*) { return kSuccess; }
EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
  const std::string kernel = name;
  void* run = dlsym(module, ("bw_run_" + kernel).c_str());
  void* count = dlsym(module, ("bw_count_" + kernel).c_str());
  if (run == nullptr || count == nullptr) return Failed(kNotFound, "no emulated kernel " + kernel);
  *function = new Kernel{reinterpret_cast<RunKernel>(run), *static_cast<const int*>(count)};
  return kSuccess;
}
EXPORT int cuFuncSetAttribute(void*, int, int) { return kSuccess; }
EXPORT int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void**) {
  Work work{};
  work.launch.kernel = *static_cast<Kernel*>(function);
  for (int i = 0; i < work.launch.kernel.count; ++i) {
    work.launch.arguments.push_back(*static_cast<void**>(parameters[i]));
  }
  memcpy(work.launch.grid, config->grid, sizeof(config->grid));
  memcpy(work.launch.block, config->block, sizeof(config->block));
  work.launch.shared = config->shared;
  return Submit(work, config->stream);
}
EXPORT int cuDeviceGetName(char* name, int length, int) {
  snprintf(name, static_cast<size_t>(length), "emulated");
  return kSuccess;
}
EXPORT int cuGetErrorName(int, const char** text) {
  *text = "emulation";
  return kSuccess;
}
EXPORT int cuGetErrorString(int, const char** text) {
  *text = failure.c_str();
  return kSuccess;
}
EXPORT int cuTensorMapEncodeTiled(void*, ...) { return Failed(kInvalid, "tensor maps are not emulated"); }

EXPORT int cudaGetDeviceCount(int* count) {
  *count = 1;
  return kSuccess;
}
EXPORT int cudaSetDevice(int) { return kSuccess; }
EXPORT int cudaGetDevice(int* device) {
  *device = 0;
  return kSuccess;
}
EXPORT int cudaDeviceGetAttribute(int* value, int attribute, int) {
  const std::map<int, int> known = {{1, 1024}, {8, 1 << 16}, {10, 32}, {16, 1}, {75, 8}, {76, 0}, {97, 1 << 17}};
  auto found = known.find(attribute);
  *value = found == known.end() ? 1 << 16 : found->second;
  return kSuccess;
}
EXPORT int cudaGetDeviceProperties(char* properties, int) {
  snprintf(properties, 256, "emulated");
  return kSuccess;
}
EXPORT int cudaMalloc(void** at, size_t size) { return Allocate(at, size); }
EXPORT int cudaMallocHost(void** at, size_t size) { return Allocate(at, size); }
EXPORT int cudaFree(void* at) { return Release(at); }
EXPORT int cudaFreeHost(void* at) { return Release(at); }
EXPORT int cudaMemGetInfo(size_t* left, size_t* total) {
  *left = *total = size_t{1} << 34;
  return kSuccess;
}
EXPORT int cudaMemcpyAsync(void* to, const void* from, size_t size, int, void* stream) {
  Work work{};
  work.is_copy = true;
  work.copy = {to, from, size};
  return Submit(work, stream);
}
EXPORT int cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, void* stream) {
  return cudaMemcpyAsync(to, from, size, 0, stream);
}
EXPORT int cudaStreamCreate(void** stream) {
  static int streams[64], next = 0;
  *stream = &streams[next++ % 64];
  return kSuccess;
}
EXPORT int cudaStreamCreateWithFlags(void** stream, unsigned) { return cudaStreamCreate(stream); }
EXPORT int cudaStreamDestroy(void*) { return kSuccess; }
EXPORT int cudaStreamSynchronize(void*) { return kSuccess; }
EXPORT int cudaStreamWaitEvent(void*, void*, unsigned) { return kSuccess; }
EXPORT int cudaEventCreate(void** event) { return cudaStreamCreate(event); }
EXPORT int cudaEventDestroy(void*) { return kSuccess; }
EXPORT int cudaEventRecord(void*, void*) { return kSuccess; }
EXPORT int cudaEventSynchronize(void*) { return kSuccess; }
EXPORT int cudaEventElapsedTime(float* milliseconds, void*, void*) {
  *milliseconds = 0;
  return kSuccess;
}
EXPORT int cudaStreamBeginCapture(void* stream, int) {
  captured = new Graph;
  capturing_stream = stream;
  return kSuccess;
}
// No function of CUDA's: tells the runner that kernels are called but not executed.
EXPORT int cudaEmulatedIsCapturing() { return captured != nullptr; }
EXPORT int cudaStreamEndCapture(void*, void** graph) {
  *graph = captured;
  captured = nullptr;
  return *graph ? kSuccess : Failed(kInvalid, "no capture is under way");
}
EXPORT int cudaGraphInstantiate(void** executable, void* graph, unsigned long long) {
  *executable = new Graph(*static_cast<Graph*>(graph));
  return kSuccess;
}
EXPORT int cudaGraphLaunch(void* executable, void*) {
  for (const Work& work : *static_cast<Graph*>(executable)) {
    if (int code = Do(work)) return code;
  }
  return kSuccess;
}
EXPORT int cudaGraphDestroy(void* graph) {
  delete static_cast<Graph*>(graph);
  return kSuccess;
}
EXPORT int cudaGraphExecDestroy(void* executable) { return cudaGraphDestroy(executable); }
EXPORT const char* cudaGetErrorName(int) { return "emulation"; }
EXPORT const char* cudaGetErrorString(int) { return failure.c_str(); }
EXPORT int cudaGetLastError() {
  const int code = last_error;
  last_error = kSuccess;
  return code;
}
EXPORT int cudaPeekAtLastError() { return last_error; }
