// A step of AdamW (Loshchilov and Hutter 2019) for all tensors of a parameter group in one launch.
//
//   m += (1 - beta1) (g - m)     v = beta2 v + (1 - beta2) g g     p = decay p - step m / (sqrt(v) root_inverse + eps)
//
// decay = 1 - lr * weight_decay, step = lr / (1 - beta1^t), root_inverse = 1 / sqrt(1 - beta2^t), computed in float64
// by the caller. Moments are float32. Parameters of two bytes have a float32 copy that the step goes on with, and are
// rounded from it. A factor on the device multiplies the gradients first: clipping costs no pass of its own.
//
// Bytes a parameter of float32 with its gradient: 16 read, 12 written. Each is touched once, so there is nothing to
// keep and nothing to share: a thread has 64 bytes of loads in flight, and a multiprocessor's threads together enough
// of them.
#include "fused/multi_tensor.cuh"

namespace fused {
namespace {

using namespace training;
using native::Arguments, native::DataType, native::View;

// A row of the table.
struct Parameter {
  int64_t p, g, m, v;  // addresses
  int64_t master;      // of the float32 copy; 0 where p is float32
  int64_t count, type_p, type_g;
};

struct Step {
  float decay, beta1_rest, beta2, beta2_rest, step, root_inverse, eps;
  const float* factor;  // null: 1

  PTX_INLINE void apply(float& p, float g, float& m, float& v) const {
    m += beta1_rest * (g - m);
    v = beta2 * v + beta2_rest * g * g;
    p = decay * p - __fdividef(step * m, sqrtf(v) * root_inverse + eps);
  }
};

__global__ void __launch_bounds__(chunk_threads) adamw(const Parameter* parameters, const Chunk* chunks, Step step) {
  const Chunk chunk = chunks[blockIdx.x];
  const Parameter t = parameters[chunk.tensor];
  const float factor = step.factor ? *step.factor : 1.f;
  const int64_t exact = t.master ? t.master : t.p;  // float32
  const bool fours = in_fours(t.p, t.type_p) && in_fours(t.g, t.type_g) && in_fours(exact, type_f32) &&
                     in_fours(t.m, type_f32) && in_fours(t.v, type_f32);
  for_chunk(
      chunk.number, t.count, fours,
      [&](int64_t i) {
        float p[4], g[4], m[4], v[4];
        load_four(exact, type_f32, i, p);
        load_four(t.m, type_f32, i, m);
        load_four(t.v, type_f32, i, v);
        load_four(t.g, t.type_g, i, g);  // the last, since its type may need a conversion, which waits
#pragma unroll
        for (int j = 0; j < 4; ++j) step.apply(p[j], factor * g[j], m[j], v[j]);
        store_four(exact, type_f32, i, p);
        store_four(t.m, type_f32, i, m);
        store_four(t.v, type_f32, i, v);
        if (t.master) store_four(t.p, t.type_p, i, p);
      },
      [&](int64_t i) {
        float p = load_one(exact, type_f32, i), m = load_one(t.m, type_f32, i), v = load_one(t.v, type_f32, i);
        step.apply(p, factor * load_one(t.g, t.type_g, i), m, v);
        store_one(exact, type_f32, i, p);
        store_one(t.m, type_f32, i, m);
        store_one(t.v, type_f32, i, v);
        if (t.master) store_one(t.p, t.type_p, i, p);
      });
}

void run(const Arguments& given) {
  const Tables tables = Tables::of(given, sizeof(Parameter) / sizeof(int64_t));
  const auto number = [&](const char* name) { return float(given.number(name)); };
  Step step = {number("decay"), number("beta1_rest"), number("beta2"), number("beta2_rest"),
               number("step"),  number("root_inverse"), number("eps"), nullptr};
  if (const View* const factor = given.optional("factor")) {
    if (factor->elements() != 1) factor->refuse("shape " + factor->shape() + ": expected one element");
    step.factor = factor->expect_type({DataType::f32}).as<float>();
  }
  simt::launch(adamw, simt::Launch{dim3(tables.count), dim3(chunk_threads), 0, 1, false, given.stream},
               reinterpret_cast<const Parameter*>(tables.tensors), tables.chunks, step);
}

const native::Operation operation("adamw", run);

}  // namespace
}  // namespace fused
