/* Running a compiled model from C or C++, without Python.
 *
 *   bw_model* model = NULL;
 *   if (bw_open("out/lib", &model) != BW_OK) { puts(bw_last_error()); return 1; }
 *   bw_tensor x = {BW_FLOAT32, 2, {1, 64}, data, sizeof data};
 *   if (bw_run(model, &x, 1) != BW_OK) { puts(bw_last_error()); return 1; }
 *   bw_tensor y;
 *   bw_result(model, 0, &y);            // y.data is valid until the next bw_run or bw_close
 *   bw_close(model);
 *
 * A handle is used by one thread at a time; threads that run at once open a handle each, which share code and weights.
 * Opening, closing and running different handles from different threads at once is allowed. In C++, bitwright::Model
 * below does the same with exceptions.
 */
#ifndef BITWRIGHT_RUNTIME_H_
#define BITWRIGHT_RUNTIME_H_

#include <stddef.h>
#include <stdint.h>

#define BW_ABI_VERSION 1
#define BW_MAX_RANK 16
#if defined(__GNUC__)
#define BW_API __attribute__((visibility("default")))
#else
#define BW_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum bw_status {
  BW_OK = 0,
  BW_ERROR_ARGUMENT = 1, /* a null pointer, an index out of range, a handle in use by another thread */
  BW_ERROR_BUNDLE = 2,   /* a file of the bundle is missing, cut short, changed, or of another version */
  BW_ERROR_MACHINE = 3,  /* this processor or kernel lacks an instruction set the code was compiled for */
  BW_ERROR_INPUT = 4,    /* an input's type or shape does not fit the model */
  BW_ERROR_MEMORY = 5,   /* out of memory */
  BW_ERROR_RUNTIME = 6   /* TVM's runtime reported an error */
} bw_status;

typedef enum bw_dtype {
  BW_BOOL = 0,
  BW_INT8 = 1,
  BW_UINT8 = 2,
  BW_INT16 = 3,
  BW_UINT16 = 4,
  BW_INT32 = 5,
  BW_UINT32 = 6,
  BW_INT64 = 7,
  BW_UINT64 = 8,
  BW_FLOAT16 = 9,
  BW_FLOAT32 = 10,
  BW_FLOAT64 = 11
} bw_dtype;

typedef struct bw_model bw_model;

/* An input or output of the model. dims[i] is -1 where the size is free, and dim_names[i] is its name then, else NULL.
 * Strings belong to the handle. */
typedef struct bw_port {
  const char* name;
  bw_dtype dtype;
  int32_t rank;
  int64_t dims[BW_MAX_RANK];
  const char* dim_names[BW_MAX_RANK];
} bw_port;

/* Row-major values; `bytes` is the size of the memory at `data`. */
typedef struct bw_tensor {
  bw_dtype dtype;
  int32_t rank;
  int64_t shape[BW_MAX_RANK];
  void* data;
  size_t bytes;
} bw_tensor;

/* A model that is linked into the program: libNAME.a defines one called NAME, declared in NAME.h. */
typedef struct bw_embedded {
  const char* text;   /* content of model.txt */
  const char* prefix; /* of its symbols in TVM's table */
  void (*register_symbols)(void);
} bw_embedded;

/* BW_ABI_VERSION of the library that is linked. */
BW_API int32_t bw_abi_version(void);

/* Opens the `lib` folder of a bundle; its files are compared with their recorded sizes and checksums. */
BW_API bw_status bw_open(const char* folder, bw_model** model);

/* Opens a model that is linked into the program. */
BW_API bw_status bw_open_embedded(const bw_embedded* embedded, bw_model** model);

/* Frees a handle and the results it owns; NULL is allowed. Working memory stays in the process for later handles. */
BW_API void bw_close(bw_model* model);

/* What the last failed call of this thread says; never NULL. */
BW_API const char* bw_last_error(void);

BW_API int32_t bw_input_count(const bw_model* model);
BW_API int32_t bw_output_count(const bw_model* model);
BW_API bw_status bw_input(const bw_model* model, int32_t index, bw_port* port);
BW_API bw_status bw_output(const bw_model* model, int32_t index, bw_port* port);

/* The number of threads that bw_run uses, the calling one included. The default is the bundle's, and no more than the
 * processors the process may use. Worker threads belong to the thread that calls bw_run, and their number is settled by
 * its first run: later, only fewer can be used. */
BW_API bw_status bw_set_threads(bw_model* model, int32_t threads);

/* A decoder that was compiled with --context keeps its caches in the handle: they are no inputs and no outputs. Its input
 * past_length says how many positions of them count, so 0 begins a new text, and a smaller number takes tokens back:
 *
 *   bw_tensor inputs[] = {{BW_INT64, 2, {1, count}, tokens, count * 8}, {BW_INT32, 1, {1}, &past, 4}};
 *   bw_run(model, inputs, 2);   past += count;   ... the logits of the last row say what follows; append it, run again
 */

/* Computes the model. Inputs are given in the model's order and copied; a free dimension has any size up to the largest
 * the bundle was compiled for. */
BW_API bw_status bw_run(bw_model* model, const bw_tensor* inputs, int32_t count);

/* An output of the last bw_run. It belongs to the handle and is valid until the next bw_run or bw_close. */
BW_API bw_status bw_result(const bw_model* model, int32_t index, bw_tensor* tensor);

#ifdef __cplusplus
} /* extern "C" */

#ifndef BW_NO_CXX_WRAPPER
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace bitwright {

/* What a bw_status other than BW_OK becomes. */
class Error : public std::runtime_error {
 public:
  explicit Error(bw_status status) : std::runtime_error(bw_last_error()), status(status) {}
  const bw_status status;
};

inline void check(bw_status status) {
  if (status != BW_OK) throw Error(status);
}

/* Owns a handle. */
class Model {
 public:
  explicit Model(const std::string& folder) { check(bw_open(folder.c_str(), &model_)); }
  explicit Model(const bw_embedded& embedded) { check(bw_open_embedded(&embedded, &model_)); }
  Model(Model&& other) noexcept : model_(std::exchange(other.model_, nullptr)) {}
  Model& operator=(Model&& other) noexcept {
    std::swap(model_, other.model_);
    return *this;
  }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;
  ~Model() { bw_close(model_); }

  std::vector<bw_port> inputs() const { return ports(bw_input_count(model_), bw_input); }
  std::vector<bw_port> outputs() const { return ports(bw_output_count(model_), bw_output); }
  void set_threads(int32_t threads) { check(bw_set_threads(model_, threads)); }

  /* The results' data is valid until the next run. */
  std::vector<bw_tensor> run(const std::vector<bw_tensor>& inputs) {
    check(bw_run(model_, inputs.data(), static_cast<int32_t>(inputs.size())));
    std::vector<bw_tensor> results(static_cast<size_t>(bw_output_count(model_)));
    for (size_t i = 0; i < results.size(); ++i) check(bw_result(model_, static_cast<int32_t>(i), &results[i]));
    return results;
  }

 private:
  std::vector<bw_port> ports(int32_t count, bw_status (*get)(const bw_model*, int32_t, bw_port*)) const {
    std::vector<bw_port> found(static_cast<size_t>(count));
    for (int32_t i = 0; i < count; ++i) check(get(model_, i, &found[static_cast<size_t>(i)]));
    return found;
  }

  bw_model* model_ = nullptr;
};

} /* namespace bitwright */
#endif /* BW_NO_CXX_WRAPPER */
#endif /* __cplusplus */
#endif /* BITWRIGHT_RUNTIME_H_ */
