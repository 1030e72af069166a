// Softmax of rows, forward and backward:
//
//   y = exp(x - m) / sum(exp(x - m)), m = max(x)            d_x = y * (d_y - sum(y * d_y))
//
// A row that fits into a block's registers is read once. A wider one is read twice: maximum and sum in one pass (what
// was summed under a smaller maximum is scaled down), the result in a second, whose reads L2 serves where the rows in
// flight fit into it. Refuses: rows of more than 2^30 elements.
#include "fused/rows.cuh"

namespace fused {
namespace softmax {
namespace {

constexpr float log2_e = 1.4426950408889634f;
constexpr int narrow_threads = 128, wide_threads = 512, wide_chunks = 4;

PTX_INLINE float exp_of(float x) { return ptx::exp2_approx(x * log2_e); }

// a and b are what is read: x and nothing, or y and d_y. `to` is y or d_x.
template <class T>
struct Problem {
  Sizes sizes;
  Rows<const T> a, b;
  Rows<T> to;
  int64_t width;
  int team;
};

// One team, one row. Bytes: x read, y written.
template <class T, int n, int chunks>
__global__ void __launch_bounds__(most_threads<n, chunks>, 1) forward(const __grid_constant__ Problem<T> p) {
  __shared__ float slots[2][most_warps];
  const Team team(p.team);
  const int row = blockIdx.x * team.count + team.index;
  const bool there = row < p.sizes.rows;
  const Place at = p.sizes.place(there ? row : 0);
  const Span<T, n> span{there ? int(p.width) : 0, team.size, team.rank};

  Bits<T, n> bits[chunks];
  span.load(p.a.at(at), bits);
  float most = -INFINITY, sum = 0.f;
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    if (!span.inside(c)) continue;
    float x[n];
    unpack<T, n>(bits[c], x);
#pragma unroll
    for (int j = 0; j < n; ++j) most = max(most, x[j]);
  }
  most = team.most(most, slots[0]);
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    if (!span.inside(c)) continue;
    float x[n];
    unpack<T, n>(bits[c], x);
#pragma unroll
    for (int j = 0; j < n; ++j) sum += exp_of(x[j] - most);
  }
  const float factor = 1.f / team.sum(sum, slots[1]);
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    if (!span.inside(c)) continue;
    float x[n];
    unpack<T, n>(bits[c], x);
#pragma unroll
    for (int j = 0; j < n; ++j) x[j] = exp_of(x[j] - most) * factor;  // again: cheaper than registers for the first
    span.store(p.to.at(at), c, x);
  }
}

// One team, one row. Bytes: y and d_y read, d_x written.
template <class T, int n, int chunks>
__global__ void __launch_bounds__(most_threads<n, chunks>, 1) backward(const __grid_constant__ Problem<T> p) {
  __shared__ float slots[most_warps];
  const Team team(p.team);
  const int row = blockIdx.x * team.count + team.index;
  const bool there = row < p.sizes.rows;
  const Place at = p.sizes.place(there ? row : 0);
  const Span<T, n> span{there ? int(p.width) : 0, team.size, team.rank};

  Bits<T, n> y_bits[chunks], d_y_bits[chunks];
  span.load(p.a.at(at), y_bits);
  span.load(p.b.at(at), d_y_bits);
  float sum = 0.f;
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    float y[n], d_y[n];
    unpack<T, n>(y_bits[c], y);
    unpack<T, n>(d_y_bits[c], d_y);
#pragma unroll
    for (int j = 0; j < n; ++j) sum += y[j] * d_y[j];
  }
  sum = team.sum(sum, slots);
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    if (!span.inside(c)) continue;
    float y[n], d_y[n];
    unpack<T, n>(y_bits[c], y);
    unpack<T, n>(d_y_bits[c], d_y);
#pragma unroll
    for (int j = 0; j < n; ++j) y[j] *= d_y[j] - sum;
    span.store(p.to.at(at), c, y);
  }
}

// ---- rows wider than registers: a block walks along the row in strips -----------------------------------------------
constexpr int widest = 1 << 30;
template <int n>
constexpr int strip = wide_threads * wide_chunks * n;

// Bytes: x read twice, y written.
template <class T, int n>
__global__ void __launch_bounds__(wide_threads) forward_wide(const __grid_constant__ Problem<T> p) {
  __shared__ float slots[2][most_warps];
  const Team team(wide_threads);
  const Place at = p.sizes.place(blockIdx.x);
  const T* const from = p.a.at(at);
  T* const to = p.to.at(at);
  const int width = int(p.width);
  Bits<T, n> bits[wide_chunks];

  float most = -INFINITY, sum = 0.f;
#pragma unroll 1
  for (int first = 0; first < width; first += strip<n>) {
    const Span<T, n> span{width - first, team.size, team.rank};
    span.load(from + first, bits);
#pragma unroll
    for (int c = 0; c < wide_chunks; ++c) {
      if (!span.inside(c)) continue;
      float x[n], top = most;
      unpack<T, n>(bits[c], x);
#pragma unroll
      for (int j = 0; j < n; ++j) top = max(top, x[j]);
      const float shift = top == -INFINITY ? 0.f : top;  // nothing but -inf so far: exp(-inf - 0) = 0
      sum *= exp_of(most - shift);
#pragma unroll
      for (int j = 0; j < n; ++j) sum += exp_of(x[j] - shift);
      most = top;
    }
  }
  const float top = team.most(most, slots[0]);
  sum *= exp_of(most - (top == -INFINITY ? 0.f : top));
  const float factor = 1.f / team.sum(sum, slots[1]);

#pragma unroll 1
  for (int first = 0; first < width; first += strip<n>) {
    const Span<T, n> span{width - first, team.size, team.rank};
    span.load(from + first, bits);
#pragma unroll
    for (int c = 0; c < wide_chunks; ++c) {
      if (!span.inside(c)) continue;
      float x[n];
      unpack<T, n>(bits[c], x);
#pragma unroll
      for (int j = 0; j < n; ++j) x[j] = exp_of(x[j] - top) * factor;
      span.store(to + first, c, x);
    }
  }
}

// Bytes: y and d_y read twice, d_x written.
template <class T, int n>
__global__ void __launch_bounds__(wide_threads) backward_wide(const __grid_constant__ Problem<T> p) {
  __shared__ float slots[most_warps];
  const Team team(wide_threads);
  const Place at = p.sizes.place(blockIdx.x);
  const int width = int(p.width);
  Bits<T, n> y_bits[wide_chunks], d_y_bits[wide_chunks];

  float sum = 0.f;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
    for (int first = 0; first < width; first += strip<n>) {
      const Span<T, n> span{width - first, team.size, team.rank};
      span.load(p.a.at(at) + first, y_bits);
      span.load(p.b.at(at) + first, d_y_bits);
#pragma unroll
      for (int c = 0; c < wide_chunks; ++c) {
        if (!span.inside(c)) continue;
        float y[n], d_y[n];
        unpack<T, n>(y_bits[c], y);
        unpack<T, n>(d_y_bits[c], d_y);
        if (pass == 0) {
#pragma unroll
          for (int j = 0; j < n; ++j) sum += y[j] * d_y[j];
        } else {
#pragma unroll
          for (int j = 0; j < n; ++j) y[j] *= d_y[j] - sum;
          span.store(p.to.at(at) + first, c, y);
        }
      }
    }
    if (pass == 0) sum = team.sum(sum, slots);
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------
// `b` null: forward.
void run(const View& a, const View* b, const View& to, void* stream) {
  const Sizes sizes = sizes_of(a);
  const int64_t width = width_of(a);
  if (width < 1 || width > widest) a.refuse("rows of " + std::to_string(width) + " elements: expected 1 to 2^30");
  if (sizes.rows == 0) return;
  with_chunk(a.type, aligned(width, {&a, b, &to}), [&](auto element, auto size) {
    using T = decltype(element);
    constexpr int n = size;
    Problem<T> p = {sizes, rows_of<const T>(&a, a, width), rows_of<const T>(b, a, width), rows_of<T>(&to, a, width),
                    width, 0};
    if (width > widest_row<n>) {
      return simt::launch(b ? backward_wide<T, n> : forward_wide<T, n>, launch_of(sizes.rows, wide_threads, stream), p);
    }
    const Plan plan = plan_of<n>(width, narrow_threads);
    p.team = plan.team;
    with_count<n>(plan.chunks, [&](auto chunks) {
      const auto launch = launch_of(divide_up(sizes.rows, plan.teams), plan.threads(), stream);
      simt::launch(b ? backward<T, n, chunks> : forward<T, n, chunks>, launch, p);
    });
  });
}

void run_forward(const native::Arguments& given) { run(given.array("x"), nullptr, given.array("y"), given.stream); }
void run_backward(const native::Arguments& given) {
  run(given.array("y"), &given.array("d_y"), given.array("d_x"), given.stream);
}

const native::Operation forward_operation("softmax_forward", run_forward);
const native::Operation backward_operation("softmax_backward", run_backward);

}  // namespace
}  // namespace softmax
}  // namespace fused
