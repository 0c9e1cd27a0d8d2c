// Continues a text by the most probable tokens with a decoder that is linked into the program.
//
//   generate_driver COUNT TOKEN ...     prints COUNT further tokens, then what a call beyond the caches says
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "tiny.h"

namespace {

int64_t MostProbable(const bw_tensor& logits) {
  const int64_t vocabulary = logits.shape[2];
  const float* last = static_cast<const float*>(logits.data) + (logits.shape[1] - 1) * vocabulary;
  int64_t best = 0;
  for (int64_t k = 1; k < vocabulary; ++k) best = last[k] > last[best] ? k : best;
  return best;
}

bw_tensor Run(bitwright::Model* model, std::vector<int64_t>* tokens, int32_t past) {
  const int64_t count = static_cast<int64_t>(tokens->size());
  bw_tensor ids = {BW_INT64, 2, {1, count}, tokens->data(), static_cast<size_t>(count) * sizeof(int64_t)};
  bw_tensor length = {BW_INT32, 1, {1}, &past, sizeof(past)};
  return model->run({ids, length})[0];
}

}  // namespace

int main(int argc, char** argv) {
  bitwright::Model model(tiny);
  std::vector<int64_t> tokens;
  for (int k = 2; k < argc; ++k) tokens.push_back(std::atoll(argv[k]));
  int32_t past = 0;
  for (int k = 0; k < std::atoi(argv[1]); ++k) {
    const int64_t next = MostProbable(Run(&model, &tokens, past));
    past += static_cast<int32_t>(tokens.size());
    tokens.assign(1, next);
    std::printf("%lld\n", static_cast<long long>(next));
  }
  try {
    Run(&model, &tokens, 48);
  } catch (const bitwright::Error& error) {
    std::printf("%d %s\n", static_cast<int>(error.status), error.what());
  }
  return 0;
}
