// model.txt: what the runtime must know of a compiled model, one record a line, names percent-encoded.
//
//   bitwright-model 1
//   library FILE BYTES ADLER32        absent in a model that is linked into the program
//   onnxruntime COUNT                 parts that only ONNX Runtime can execute
//   processor FLAG ...                of /proc/cpuinfo
//   threads COUNT
//   device cuda                       absent in a model that runs on the processor
//   dim NAME bucket SIZE ...          or: dim NAME loop; or, for any size: dim NAME any SIZE ...
//                                     or, for any size up to a largest one: dim NAME upto LARGEST SIZE ...
//   input NAME TYPE PAD RANK SIZE ... a SIZE of $K is dimension K; PAD is - or a number
//   cache INPUT DIM CAPACITY          input INPUT says how many positions the caches hold, dimension DIM how many come
//   state NAME TYPE - RANK SIZE ...   a cache: an input behind the others that the handle keeps and calls write to; the
//                                     model returns it behind its outputs
//   output NAME TYPE - RANK SIZE ...
//   function NAME SIZE ...            the size of every dimension, 1 for a looped one, 0 for any
//   end
#pragma once

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bitwright_runtime.h"

namespace model_text {

struct Type {
  const char* name;
  bw_dtype dtype;
  uint8_t code, bits;  // of a DLDataType
};

constexpr Type kTypes[] = {
    {"bool", BW_BOOL, 6, 8},       {"int8", BW_INT8, 0, 8},         {"uint8", BW_UINT8, 1, 8},
    {"int16", BW_INT16, 0, 16},    {"uint16", BW_UINT16, 1, 16},    {"int32", BW_INT32, 0, 32},
    {"uint32", BW_UINT32, 1, 32},  {"int64", BW_INT64, 0, 64},      {"uint64", BW_UINT64, 1, 64},
    {"float16", BW_FLOAT16, 2, 16}, {"float32", BW_FLOAT32, 2, 32}, {"float64", BW_FLOAT64, 2, 64},
};
constexpr int kTypeCount = sizeof(kTypes) / sizeof(kTypes[0]);

struct Dim {
  const char* name;
  int64_t* sizes;  // ascending; none if looped
  int count;
  bool loop;
  bool any;  // of any size; `sizes` are those with a function of their own
  int64_t largest;  // size that `any` has; 0 if there is none
};

struct Port {
  const char* name;
  const Type* type;
  double pad;
  int rank;
  int64_t dims[BW_MAX_RANK];  // a size, or -1 - K for dimension K
};

struct Function {
  const char* name;
  int64_t* sizes;  // of every dimension
};

// Everything points into `storage` and into memory that Free releases.
struct Text {
  char* storage;
  const char* library;
  int64_t library_bytes;
  uint32_t library_sum;
  int onnxruntime;
  const char** flags;
  int flag_count;
  int threads;
  bool cuda;
  Dim* dims;
  int dim_count;
  Port* inputs;
  int input_count;
  Port* states;
  int state_count;
  int past_input, length_dim;
  int64_t capacity;  // of the caches; 0 if there are none
  Port* outputs;
  int output_count;
  Function* functions;
  int function_count;
};

inline void Free(Text* text) {
  for (int i = 0; i < text->dim_count; ++i) free(text->dims[i].sizes);
  for (int i = 0; i < text->function_count; ++i) free(text->functions[i].sizes);
  free(text->flags);
  free(text->dims);
  free(text->inputs);
  free(text->states);
  free(text->outputs);
  free(text->functions);
  free(text->storage);
  memset(text, 0, sizeof(*text));
}

// Adds a zeroed element to an array; null if there is no memory.
template <typename T>
T* Append(T** array, int* count) {
  void* grown = realloc(static_cast<void*>(*array), (static_cast<size_t>(*count) + 1) * sizeof(T));
  if (grown == nullptr) return nullptr;
  *array = static_cast<T*>(grown);
  T* added = *array + (*count)++;
  memset(static_cast<void*>(added), 0, sizeof(T));
  return added;
}

// The words of one line, taken one after the other.
struct Line {
  char* at;

  char* Word() {
    while (*at == ' ') ++at;
    if (*at == 0) return nullptr;
    char* word = at;
    while (*at != 0 && *at != ' ') ++at;
    if (*at != 0) *at++ = 0;
    return word;
  }

  bool Number(int64_t low, int64_t high, int64_t* number) {
    char* word = Word();
    if (word == nullptr) return false;
    char* end = nullptr;
    errno = 0;
    *number = strtoll(word, &end, 10);
    return end != word && *end == 0 && errno == 0 && *number >= low && *number <= high;
  }

  bool Name(const char** name) {
    char* word = Word();
    if (word == nullptr) return false;
    char* to = word;
    *name = word;
    for (const char* from = word; *from != 0; ++from) {
      unsigned value = 0;
      int used = 0;
      if (*from == '%') {
        if (sscanf(from, "%%%2x%n", &value, &used) != 1 || used != 3 || value == 0) return false;
        *to++ = static_cast<char>(value);
        from += 2;
      } else {
        *to++ = *from;
      }
    }
    *to = 0;
    return true;
  }

  bool Done() { return Word() == nullptr; }
};

constexpr int64_t kLargestSize = int64_t{1} << 40;

inline bool ParseSizes(Line* line, int64_t** sizes, int* count) {
  while (*line->at != 0) {
    int64_t* size = Append(sizes, count);
    if (size == nullptr || !line->Number(1, kLargestSize, size)) return false;
    if (*count > 1 && (*sizes)[*count - 1] <= (*sizes)[*count - 2]) return false;
  }
  return *count > 0;
}

inline bool ParseDim(Line* line, Text* text) {
  Dim* dim = Append(&text->dims, &text->dim_count);
  if (dim == nullptr || !line->Name(&dim->name)) return false;
  const char* kind = line->Word();
  dim->loop = kind != nullptr && strcmp(kind, "loop") == 0;
  if (dim->loop) return line->Done();
  bool bounded = kind != nullptr && strcmp(kind, "upto") == 0;
  if (bounded && !line->Number(1, kLargestSize, &dim->largest)) return false;
  dim->any = bounded || (kind != nullptr && strcmp(kind, "any") == 0);
  return kind != nullptr && (dim->any || strcmp(kind, "bucket") == 0) && ParseSizes(line, &dim->sizes, &dim->count);
}

inline bool ParsePort(Line* line, const Text& text, Port* port) {
  if (port == nullptr || !line->Name(&port->name)) return false;
  const char* type = line->Word();
  for (int i = 0; type != nullptr && i < kTypeCount; ++i) {
    if (strcmp(kTypes[i].name, type) == 0) port->type = &kTypes[i];
  }
  const char* pad = line->Word();
  int64_t rank = 0;
  if (port->type == nullptr || pad == nullptr || !line->Number(0, BW_MAX_RANK, &rank)) return false;
  port->pad = atof(pad);
  port->rank = static_cast<int>(rank);
  for (int i = 0; i < port->rank; ++i) {
    while (*line->at == ' ') ++line->at;
    bool named = *line->at == '$';
    if (named) ++line->at;
    if (!line->Number(0, named ? text.dim_count - 1 : kLargestSize, &port->dims[i])) return false;
    if (named) port->dims[i] = -1 - port->dims[i];
  }
  return line->Done();
}

// The input that counts what the caches hold is one int32.
inline bool ParseCache(Line* line, Text* text) {
  int64_t input = 0, dim = 0;
  if (!line->Number(0, text->input_count - 1, &input) || !line->Number(0, text->dim_count - 1, &dim)) return false;
  const Port& past = text->inputs[input];
  if (past.type->dtype != BW_INT32 || past.rank != 1 || past.dims[0] != 1) return false;
  text->past_input = static_cast<int>(input);
  text->length_dim = static_cast<int>(dim);
  return line->Number(1, kLargestSize, &text->capacity) && line->Done();
}

// The size of a state is fixed, and known before the first call.
inline bool ParseState(Line* line, Text* text) {
  Port* state = Append(&text->states, &text->state_count);
  if (!ParsePort(line, *text, state)) return false;
  int64_t values = 1;
  for (int i = 0; i < state->rank; ++i) {
    if (state->dims[i] < 1 || __builtin_mul_overflow(values, state->dims[i], &values)) return false;
  }
  return values <= kLargestSize && text->capacity > 0;
}

inline bool ParseFunction(Line* line, Text* text) {
  Function* function = Append(&text->functions, &text->function_count);
  if (function == nullptr || !line->Name(&function->name)) return false;
  function->sizes = static_cast<int64_t*>(calloc(static_cast<size_t>(text->dim_count) + 1, sizeof(int64_t)));
  if (function->sizes == nullptr) return false;
  for (int i = 0; i < text->dim_count; ++i) {
    if (!line->Number(text->dims[i].any ? 0 : 1, kLargestSize, &function->sizes[i])) return false;
  }
  return line->Done();
}

inline bool ParseLibrary(Line* line, Text* text) {
  int64_t sum = 0;
  if (!line->Name(&text->library) || strchr(text->library, '/') != nullptr) return false;
  if (!line->Number(1, INT64_MAX, &text->library_bytes) || !line->Number(0, UINT32_MAX, &sum)) return false;
  text->library_sum = static_cast<uint32_t>(sum);
  return line->Done();
}

inline bool ParseFlags(Line* line, Text* text) {
  while (char* word = line->Word()) {
    const char** flag = Append(&text->flags, &text->flag_count);
    if (flag == nullptr) return false;
    *flag = word;
  }
  return true;
}

inline bool ParseCount(Line* line, int64_t low, int* count) {
  int64_t number = 0;
  bool good = line->Number(low, 1 << 20, &number) && line->Done();
  *count = static_cast<int>(number);
  return good;
}

inline bool ParseLine(const char* kind, Line* line, Text* text) {
  if (strcmp(kind, "library") == 0) return ParseLibrary(line, text);
  if (strcmp(kind, "onnxruntime") == 0) return ParseCount(line, 1, &text->onnxruntime);
  if (strcmp(kind, "processor") == 0) return ParseFlags(line, text);
  if (strcmp(kind, "threads") == 0) return ParseCount(line, 1, &text->threads);
  if (strcmp(kind, "device") == 0) {
    const char* name = line->Word();
    text->cuda = name != nullptr && strcmp(name, "cuda") == 0;
    return text->cuda && line->Done();
  }
  if (strcmp(kind, "dim") == 0) return ParseDim(line, text);
  if (strcmp(kind, "input") == 0) return ParsePort(line, *text, Append(&text->inputs, &text->input_count));
  if (strcmp(kind, "cache") == 0) return ParseCache(line, text);
  if (strcmp(kind, "state") == 0) return !text->cuda && ParseState(line, text);
  if (strcmp(kind, "output") == 0) return ParsePort(line, *text, Append(&text->outputs, &text->output_count));
  if (strcmp(kind, "function") == 0) return ParseFunction(line, text);
  return false;
}

// The largest sizes must have a function, and so must those that no function has as its own.
inline bool IsComplete(const Text& text) {
  if (text.onnxruntime > 0) return true;
  bool largest = false;
  for (int f = 0; f < text.function_count; ++f) {
    bool all = true;
    for (int d = 0; d < text.dim_count; ++d) {
      const Dim& dim = text.dims[d];
      int64_t wanted = dim.loop ? 1 : dim.any ? 0 : dim.sizes[dim.count - 1];
      all = all && text.functions[f].sizes[d] == wanted;
    }
    largest = largest || all;
  }
  return largest && text.threads > 0;
}

// Parses the content of model.txt. Returns null, or what is wrong; then `number` is the line, from 1.
inline const char* Parse(const char* content, Text* text, int* number) {
  memset(text, 0, sizeof(*text));
  *number = 1;
  text->storage = strdup(content);
  if (text->storage == nullptr) return "out of memory";
  bool ended = false;
  char* next = text->storage;
  for (*number = 1; *next != 0; ++*number) {
    char* start = next;
    next = strchr(start, '\n');
    if (next == nullptr) return "the file is cut short";
    *next++ = 0;
    Line line = {start};
    const char* kind = line.Word();
    if (*number == 1) {
      if (kind == nullptr || strcmp(kind, "bitwright-model") != 0) return "this is no model of Bitwright";
      const char* version = line.Word();
      if (version == nullptr || strcmp(version, "1") != 0) return "the version of the format is unknown";
      continue;
    }
    if (ended || kind == nullptr) return "a line is damaged";
    ended = strcmp(kind, "end") == 0;
    if (!ended && !ParseLine(kind, &line, text)) return "a line is damaged";
  }
  if (!ended) return "the file is cut short";
  return IsComplete(*text) ? nullptr : "lines are missing";
}

}  // namespace model_text
