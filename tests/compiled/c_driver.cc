// Commands for the tests of the C interface; each prints "STATUS MESSAGE" lines.
//   open FOLDER            open and close
//   ports FOLDER           inputs and outputs
//   misuse FOLDER          wrong arguments of every kind
//   memory FOLDER INPUT.npy ...           bytes of memory that the first call adds to the process
//   threads FOLDER N RUNS INPUT.npy ...   N threads with a handle each, RUNS calls, all results equal bit for bit
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "bitwright_runtime.h"
#include "npy.h"

namespace {

void Say(bw_status status) { std::printf("%d %s\n", status, status == BW_OK ? "" : bw_last_error()); }

int Open(const char* folder) {
  bw_model* model = nullptr;
  bw_status status = bw_open(folder, &model);
  Say(status);
  if ((status == BW_OK) != (model != nullptr)) return 1;
  bw_close(model);
  return 0;
}

void ShowPorts(const char* kind, const std::vector<bw_port>& ports) {
  for (const bw_port& port : ports) {
    std::printf("%s %s %d", kind, port.name, port.dtype);
    for (int i = 0; i < port.rank; ++i) {
      std::printf(" %s", port.dims[i] < 0 ? port.dim_names[i] : std::to_string(port.dims[i]).c_str());
    }
    std::printf("\n");
  }
}

int Ports(const char* folder) {
  bitwright::Model model{std::string(folder)};
  ShowPorts("input", model.inputs());
  ShowPorts("output", model.outputs());
  return 0;
}

int Misuse(const char* folder) {
  bw_model* model = nullptr;
  Say(bw_open(nullptr, &model));
  Say(bw_open(folder, nullptr));
  Say(bw_open_embedded(nullptr, &model));
  bw_close(nullptr);
  if (bw_open(folder, &model) != BW_OK) return 1;
  bw_tensor result;
  bw_port port;
  Say(bw_result(model, 0, &result));
  Say(bw_input(model, 99, &port));
  Say(bw_output(model, -1, &port));
  Say(bw_set_threads(model, 0));
  Say(bw_run(model, nullptr, 2));
  bw_tensor inputs[2] = {{BW_FLOAT32, 3, {1, 4, 16}, nullptr, 256}, {BW_FLOAT32, 2, {1, 4}, nullptr, 16}};
  Say(bw_run(model, inputs, 1));
  Say(bw_run(model, inputs, 2));
  std::vector<float> data(64 * 16, 1.0f);
  inputs[0].data = inputs[1].data = data.data();
  inputs[0].bytes = 255;
  Say(bw_run(model, inputs, 2));
  inputs[0].bytes = 256;
  inputs[0].dtype = BW_INT8;
  Say(bw_run(model, inputs, 2));
  inputs[0].dtype = BW_FLOAT32;
  inputs[0].rank = 2;
  Say(bw_run(model, inputs, 2));
  inputs[0].rank = 3;
  inputs[1].shape[1] = 5;
  Say(bw_run(model, inputs, 2));
  inputs[1].shape[1] = 4;
  inputs[0].shape[1] = inputs[1].shape[1] = -4;
  Say(bw_run(model, inputs, 2));
  inputs[0].shape[1] = inputs[1].shape[1] = 13;
  inputs[0].bytes = 13 * 16 * 4;
  inputs[1].bytes = 13 * 4;
  Say(bw_run(model, inputs, 2));
  inputs[0].shape[1] = inputs[1].shape[1] = 12;
  inputs[0].bytes = 12 * 16 * 4;
  inputs[1].bytes = 12 * 4;
  Say(bw_run(model, inputs, 2));
  Say(bw_result(model, 0, &result));
  Say(bw_result(model, 2, &result));
  bw_close(model);
  return 0;
}

std::vector<bw_tensor> ReadInputs(int count, char** paths) {
  std::vector<bw_tensor> inputs;
  for (int i = 0; i < count; ++i) {
    DLTensor array;
    npy::Read(paths[i], &array);
    bw_tensor tensor = {BW_FLOAT32, array.ndim, {0}, array.data, npy::BytesOf(array)};
    std::memcpy(tensor.shape, array.shape, sizeof(int64_t) * static_cast<size_t>(array.ndim));
    inputs.push_back(tensor);
  }
  return inputs;
}

long AnonymousBytes() {
  FILE* file = std::fopen("/proc/self/status", "r");
  char line[256];
  long kilobytes = -1;
  while (std::fgets(line, sizeof(line), file) != nullptr) std::sscanf(line, "RssAnon: %ld", &kilobytes);
  std::fclose(file);
  return kilobytes * 1024;
}

int Memory(int argc, char** argv) {
  const std::vector<bw_tensor> inputs = ReadInputs(argc - 3, argv + 3);
  bitwright::Model model{std::string(argv[2])};
  model.set_threads(1);
  const long before = AnonymousBytes();
  model.run(inputs);
  std::printf("%ld\n", AnonymousBytes() - before);
  return 0;
}

int Threads(int argc, char** argv) {
  const int count = std::atoi(argv[3]), runs = std::atoi(argv[4]);
  const std::vector<bw_tensor> inputs = ReadInputs(argc - 5, argv + 5);
  bitwright::Model reference{std::string(argv[2])};
  reference.set_threads(1);
  const std::vector<bw_tensor> expected = reference.run(inputs);
  std::atomic<int> different{0};
  auto work = [&](int number) {
    bitwright::Model model{std::string(argv[2])};
    model.set_threads(1 + number % 2);
    for (int run = 0; run < runs; ++run) {
      const std::vector<bw_tensor> found = model.run(inputs);
      for (size_t i = 0; i < found.size(); ++i) {
        bool same = found[i].bytes == expected[i].bytes &&
                    std::memcmp(found[i].data, expected[i].data, found[i].bytes) == 0;
        different += same ? 0 : 1;
      }
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(work, i);
  for (std::thread& thread : threads) thread.join();
  std::printf("%d different\n", different.load());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  const std::string command = argv[1];
  if (command == "open") return Open(argv[2]);
  if (command == "ports") return Ports(argv[2]);
  if (command == "misuse") return Misuse(argv[2]);
  if (command == "memory" && argc > 3) return Memory(argc, argv);
  if (command == "threads" && argc > 5) return Threads(argc, argv);
  return 2;
}
