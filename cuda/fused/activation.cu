// Activations element by element, forward and backward: SwiGLU silu(gate) * up, GELU exact and by tanh, ReLU squared.
// Each input is read once, each result written once; the backward pass computes the activation again from its inputs.
// The tanh of GELU is written as a sigmoid, (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), which loses nothing near -1.
#include "fused/segments.cuh"

namespace fused {
namespace activation {
namespace {

// 1 / (1 + exp(-x)) and its derivative, by exp(-|x|): nothing overflows, and no 1 - s loses what is left beside 1.
struct Sigmoid {
  float value, slope;
  PTX_INLINE explicit Sigmoid(float x) {
    const float e = __expf(-fabsf(x)), r = __fdividef(1.f, 1.f + e);
    value = x < 0.f ? e * r : r;
    slope = e * r * r;
  }
};

// What is done to an element: of `inputs` numbers, `outputs`. Bytes: as many reads and writes.
struct SwigluForward {  // gate, up
  static constexpr int inputs = 2, outputs = 1;
  static PTX_INLINE void apply(const float (&x)[2], float (&y)[1]) { y[0] = x[0] * Sigmoid(x[0]).value * x[1]; }
};
struct SwigluBackward {  // gate, up, d_y
  static constexpr int inputs = 3, outputs = 2;
  static PTX_INLINE void apply(const float (&x)[3], float (&y)[2]) {
    const Sigmoid s(x[0]);
    y[0] = x[2] * x[1] * (s.value + x[0] * s.slope);
    y[1] = x[2] * x[0] * s.value;
  }
};
struct GeluForward {
  static constexpr int inputs = 1, outputs = 1;
  static PTX_INLINE void apply(const float (&x)[1], float (&y)[1]) {
    y[0] = 0.5f * x[0] * (1.f + erff(x[0] * 0.70710678118654752f));
  }
};
struct GeluBackward {  // x, d_y
  static constexpr int inputs = 2, outputs = 1;
  static PTX_INLINE void apply(const float (&x)[2], float (&y)[1]) {
    const float below = 0.5f * (1.f + erff(x[0] * 0.70710678118654752f));
    const float density = 0.39894228040143268f * __expf(-0.5f * x[0] * x[0]);
    y[0] = x[1] * (below + x[0] * density);
  }
};
constexpr float gelu_slope = 1.5957691216057308f, gelu_cube = 0.044715f;  // 2 * sqrt(2 / pi)
struct GeluTanhForward {
  static constexpr int inputs = 1, outputs = 1;
  static PTX_INLINE void apply(const float (&x)[1], float (&y)[1]) {
    y[0] = x[0] * Sigmoid(gelu_slope * (x[0] + gelu_cube * x[0] * x[0] * x[0])).value;
  }
};
struct GeluTanhBackward {  // x, d_y
  static constexpr int inputs = 2, outputs = 1;
  static PTX_INLINE void apply(const float (&x)[2], float (&y)[1]) {
    const float square = x[0] * x[0];
    const Sigmoid s(gelu_slope * (x[0] + gelu_cube * square * x[0]));
    y[0] = x[1] * (s.value + x[0] * s.slope * gelu_slope * (1.f + 3.f * gelu_cube * square));
  }
};
struct Relu2Forward {  // the comparison lets NaN through
  static constexpr int inputs = 1, outputs = 1;
  static PTX_INLINE void apply(const float (&x)[1], float (&y)[1]) { y[0] = x[0] <= 0.f ? 0.f : x[0] * x[0]; }
};
struct Relu2Backward {  // x, d_y
  static constexpr int inputs = 2, outputs = 1;
  static PTX_INLINE void apply(const float (&x)[2], float (&y)[1]) { y[0] = x[0] <= 0.f ? 0.f : 2.f * x[0] * x[1]; }
};

template <class T, class F>
struct Problem {
  Sizes sizes;
  Segments segments;
  Rows<const T> from[F::inputs];
  Rows<T> to[F::outputs];
};

template <class F>
constexpr int chunks_of = F::inputs == 1 ? 4 : 2;  // at least 64 bytes of a thread on their way

template <class T, int n, class F>
__global__ void __launch_bounds__(segment_threads) apply(const __grid_constant__ Problem<T, F> p) {
  constexpr int chunks = chunks_of<F>;
  int row;
  int64_t first;
  Span<T, n> span;
  if (!p.segments.take(row, first, span)) return;
  const Place at = p.sizes.place(row);

  Bits<T, n> bits[F::inputs][chunks];
#pragma unroll
  for (int i = 0; i < F::inputs; ++i) span.load(p.from[i].at(at) + first, bits[i]);
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    float x[F::inputs][n], y[F::outputs][n];
#pragma unroll
    for (int i = 0; i < F::inputs; ++i) unpack<T, n>(bits[i][c], x[i]);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      float in[F::inputs], out[F::outputs];
#pragma unroll
      for (int i = 0; i < F::inputs; ++i) in[i] = x[i][j];
      F::apply(in, out);
#pragma unroll
      for (int i = 0; i < F::outputs; ++i) y[i][j] = out[i];
    }
#pragma unroll
    for (int i = 0; i < F::outputs; ++i) span.store(p.to[i].at(at) + first, c, y[i]);
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------
// Elements `from` to `to` - 1 of an array of one dimension.
View part(View x, int64_t from, int64_t to) {
  x.data += from * simt::size_of(x.type);
  x.size[0] = to - from;
  return x;
}

template <class F>
void run(const std::vector<View>& arrays, void* stream) {
  const View& x = arrays[0];
  const Sizes sizes = sizes_of(x);
  const int64_t width = width_of(x);
  if (sizes.rows == 0 || width == 0) return;
  bool whole = true;
  for (const View& one : arrays) whole = whole && aligned(width, {&one});
  with_chunk(x.type, whole, [&](auto element, auto size) {
    using T = decltype(element);
    constexpr int n = size;
    Problem<T, F> p = {sizes, segments_of<n>(x, sizes.rows, width, chunks_of<F>), {}, {}};
    for (int i = 0; i < F::inputs; ++i) p.from[i] = rows_of<const T>(&arrays[i], x, width);
    for (int i = 0; i < F::outputs; ++i) p.to[i] = rows_of<T>(&arrays[F::inputs + i], x, width);
    simt::launch(apply<T, n, F>, launch_of(p.segments, stream), p);
  });
}

// One long row whose end is no multiple of 16 bytes: that end goes element by element, and the rest does not.
template <class F>
void run_all(const std::vector<View>& arrays, void* stream) {
  const View& x = arrays[0];
  const int64_t tail = x.rank == 1 ? x.size[0] % (16 / simt::size_of(x.type)) : 0;
  if (tail == 0 || x.size[0] == tail) return run<F>(arrays, stream);
  std::vector<View> body, end;
  for (const View& one : arrays) {
    if (one.rank != 1 || one.size[0] != x.size[0]) return run<F>(arrays, stream);  // which refuses
    body.push_back(part(one, 0, x.size[0] - tail));
    end.push_back(part(one, x.size[0] - tail, x.size[0]));
  }
  run<F>(body, stream);
  run<F>(end, stream);
}

// Arrays in the order of F's inputs and outputs, by their names in `given`.
template <class F>
void run_named(const native::Arguments& given, std::initializer_list<const char*> names) {
  std::vector<View> arrays;
  for (const char* name : names) arrays.push_back(given.array(name));
  run_all<F>(arrays, given.stream);
}

[[noreturn]] void refuse(const std::string& kind) {
  throw std::invalid_argument("kind '" + kind + "': expected one of swiglu, gelu, gelu_tanh, relu2");
}

void run_forward(const native::Arguments& given) {
  const std::string& kind = given.word("kind");
  if (kind == "swiglu") run_named<SwigluForward>(given, {"gate", "up", "y"});
  else if (kind == "gelu") run_named<GeluForward>(given, {"x", "y"});
  else if (kind == "gelu_tanh") run_named<GeluTanhForward>(given, {"x", "y"});
  else if (kind == "relu2") run_named<Relu2Forward>(given, {"x", "y"});
  else refuse(kind);
}

void run_backward(const native::Arguments& given) {
  const std::string& kind = given.word("kind");
  if (kind == "swiglu") run_named<SwigluBackward>(given, {"gate", "up", "d_y", "d_gate", "d_up"});
  else if (kind == "gelu") run_named<GeluBackward>(given, {"x", "d_y", "d_x"});
  else if (kind == "gelu_tanh") run_named<GeluTanhBackward>(given, {"x", "d_y", "d_x"});
  else if (kind == "relu2") run_named<Relu2Backward>(given, {"x", "d_y", "d_x"});
  else refuse(kind);
}

const native::Operation forward_operation("activation_forward", run_forward);
const native::Operation backward_operation("activation_backward", run_backward);

}  // namespace
}  // namespace activation
}  // namespace fused
