// Attention, forward and backward: kernels in attention_{forward,backward,bias_gradient}.h, handlers in
// attention_handler.h.
#ifdef JAXEXT_KERNEL
#include "attention_backward.h"
#include "attention_bias_gradient.h"
#include "attention_forward.h"

namespace jaxext::JAXEXT_ISA {

#if defined(__AVX512BF16__)
typedef Paired Bfloat16;
#else
typedef Widened Bfloat16;
#endif

// Below about 20 microseconds of work, waking the other threads costs more than they bring.
static Parallel enough_threads(const AttentionArgs& a, const Parallel& par) {
  int64_t flops = 2 * a.batch * a.heads * a.queries * a.keys * (a.depth + a.value_depth);
  return flops <= int64_t{1} << 21 ? Parallel{par.pool, 1, par.run} : par;
}

void attention_forward(const AttentionArgs& args, const Parallel& pool) {
  Parallel par = enough_threads(args, pool);
  args.element == AttentionElement::f32 ? forward<Float32>(args, par) : forward<Bfloat16>(args, par);
}

void attention_backward(const AttentionArgs& args, const Parallel& pool) {
  Parallel par = enough_threads(args, pool);
  bool wide = args.element == AttentionElement::f32;
  if (args.dq.data || args.dk.data || args.dv.data)
    wide ? backward<Float32>(args, par) : backward<Bfloat16>(args, par);
  if (args.bias_gradient) wide ? bias_gradient<Float32>(args, par) : bias_gradient<Bfloat16>(args, par);
}

}  // namespace jaxext::JAXEXT_ISA
#endif

#ifdef JAXEXT_HANDLER
#include "attention_workspace.h"
#include "attention_handler.h"
#endif
