// Runs a model on arrays from files, as a program of your own would.
//
//   example FOLDER OUTPUT_FOLDER [--threads N] INPUT.npy ...     FOLDER holds model.txt and the library
//   example_static OUTPUT_FOLDER [--threads N] INPUT.npy ...     the model is linked into the program: compiled with
//                              -DBITWRIGHT_STATIC_MODEL=NAME '-DBITWRIGHT_STATIC_HEADER="NAME.h"'
//
// Inputs are in the model's order: .npy files, or raw values (any other name) of an input whose shape is fixed. Prints
// every output's name, shape and first values and writes it to OUTPUT_FOLDER/output_K.npy.
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "bitwright_runtime.h"
#include "npy.h"
#ifdef BITWRIGHT_STATIC_MODEL
#include BITWRIGHT_STATIC_HEADER
#endif

namespace {

struct Type {
  bw_dtype dtype;
  DLDataType dl;
};

const Type kTypes[] = {{BW_BOOL, {kDLBool, 8, 1}},      {BW_INT8, {kDLInt, 8, 1}},       {BW_UINT8, {kDLUInt, 8, 1}},
                       {BW_INT16, {kDLInt, 16, 1}},     {BW_UINT16, {kDLUInt, 16, 1}},   {BW_INT32, {kDLInt, 32, 1}},
                       {BW_UINT32, {kDLUInt, 32, 1}},   {BW_INT64, {kDLInt, 64, 1}},     {BW_UINT64, {kDLUInt, 64, 1}},
                       {BW_FLOAT16, {kDLFloat, 16, 1}}, {BW_FLOAT32, {kDLFloat, 32, 1}}, {BW_FLOAT64, {kDLFloat, 64, 1}}};

bool EndsWith(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

bw_tensor ReadNpy(const char* path) {
  DLTensor array;
  npy::Read(path, &array);
  bw_tensor tensor = {BW_FLOAT32, array.ndim, {0}, array.data, npy::BytesOf(array)};
  for (const Type& type : kTypes) {
    if (type.dl.code == array.dtype.code && type.dl.bits == array.dtype.bits) tensor.dtype = type.dtype;
  }
  std::memcpy(tensor.shape, array.shape, sizeof(int64_t) * static_cast<size_t>(array.ndim));
  return tensor;
}

bw_tensor ReadRaw(const char* path, const bw_port& port) {
  bw_tensor tensor = {port.dtype, port.rank, {0}, nullptr, kTypes[port.dtype].dl.bits / 8u};
  for (int i = 0; i < port.rank; ++i) {
    if (port.dims[i] < 0) npy::Fail(2, path, "raw values have no shape, and this input's is free: give an .npy file");
    tensor.shape[i] = port.dims[i];
    tensor.bytes *= static_cast<size_t>(port.dims[i]);
  }
  FILE* file = std::fopen(path, "rb");
  if (file == nullptr) npy::Fail(2, path, std::strerror(errno));
  tensor.data = npy::Allocate(tensor.bytes);
  bool whole = std::fread(tensor.data, 1, tensor.bytes, file) == tensor.bytes && std::fgetc(file) == EOF;
  std::fclose(file);
  if (!whole) npy::Fail(2, path, "does not have the size of this input");
  return tensor;
}

void Show(const bw_port& port, const bw_tensor& tensor, const char* folder, int number) {
  DLTensor array = {tensor.data, {kDLCPU, 0}, tensor.rank, kTypes[tensor.dtype].dl, const_cast<int64_t*>(tensor.shape),
                    nullptr, 0};
  npy::WriteOutput(folder, number, array);
  std::printf("%s [", port.name);
  for (int i = 0; i < tensor.rank; ++i) std::printf(i == 0 ? "%lld" : ", %lld", static_cast<long long>(tensor.shape[i]));
  std::printf("]");
  if (tensor.dtype == BW_FLOAT32) {
    for (size_t i = 0; i < tensor.bytes / 4 && i < 4; ++i) std::printf(" %g", static_cast<float*>(tensor.data)[i]);
  }
  std::printf("\n");
}

int Main(int argc, char** argv) {
#ifdef BITWRIGHT_STATIC_MODEL
  const int first = 1;
  if (argc < 2) npy::Fail(2, "usage", "OUTPUT_FOLDER [--threads N] INPUT ...");
  bitwright::Model model(BITWRIGHT_STATIC_MODEL);
#else
  const int first = 2;
  if (argc < 3) npy::Fail(2, "usage", "FOLDER OUTPUT_FOLDER [--threads N] INPUT ...");
  bitwright::Model model(argv[1]);
#endif
  int at = first + 1;
  if (at + 1 < argc && std::strcmp(argv[at], "--threads") == 0) {
    model.set_threads(std::atoi(argv[at + 1]));
    at += 2;
  }
  const std::vector<bw_port> ports = model.inputs();
  std::vector<bw_tensor> inputs;
  for (; at < argc; ++at) {
    bool raw = !EndsWith(argv[at], ".npy") && inputs.size() < ports.size();
    inputs.push_back(raw ? ReadRaw(argv[at], ports[inputs.size()]) : ReadNpy(argv[at]));
  }
  model.run(inputs);  // the first run also starts the threads
  auto start = std::chrono::steady_clock::now();
  const std::vector<bw_tensor> results = model.run(inputs);
  std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - start;
  const std::vector<bw_port> outputs = model.outputs();
  for (size_t i = 0; i < results.size(); ++i) Show(outputs[i], results[i], argv[first], static_cast<int>(i));
  std::printf("%.1f us\n", elapsed.count());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return Main(argc, argv);
  } catch (const bitwright::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
}
