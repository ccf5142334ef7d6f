// Softmax cross-entropy of rows of logits: arguments shared by the kernels and their handlers.
#pragma once
#include "isa.h"

namespace jaxext {

struct LogitBuffer {
  void* data;
  bool bf16;
};

// Integer labels.
struct CrossEntropyArgs {
  LogitBuffer logits;     // [rows, classes]
  const int32_t* labels;  // [rows]
  LogitBuffer loss;       // [rows]; forward result
  // [rows, 2]: the maximum and the log of the sum of exponentials below it, apart because their sum would round at the
  // maximum's size; forward result, backward argument.
  float* normalizer;
  LogitBuffer grad;       // [rows]; backward: cotangent of loss
  LogitBuffer dlogits;    // [rows, classes] in the logits' type; backward result
  int64_t rows, classes;
  float smoothing;
  bool one_hot;  // labels out of range: an all-zero target; otherwise negative ones wrap once and the rest give NaN
};

// Target distributions.
struct TargetCrossEntropyArgs {
  LogitBuffer logits, targets;    // [rows, classes]
  LogitBuffer loss;               // [rows]
  float* normalizer;              // as above
  float* total;                   // [rows]: the sum of the targets
  LogitBuffer grad;               // [rows]
  LogitBuffer dlogits, dtargets;  // [rows, classes], in the types of logits and targets; absent where not wanted
  int64_t rows, classes;
};

}  // namespace jaxext
