// RMSNorm and LayerNorm of rows, forward and backward, the residual connection before them in the same pass:
//
//   h = x + residual            y = (h - mean) * rstd * gain + bias
//
// LayerNorm has rstd = 1 / sqrt(mean((h - mean)^2) + eps), and so has RMSNorm, with 0 for the mean. A row is read once
// and stays in registers while its statistics are summed, in float32; they are kept for the backward pass. Gains and
// biases are in the type of x or float32, and so are their gradients.
// Refuses: rows of more than 16384 elements of 16 bits or 12288 of 32, and of more than 5120 where addresses or the
// width are no multiples of 16 bytes.
#include "fused/rows.cuh"

namespace fused {
namespace norm {
namespace {

constexpr int forward_threads = 128, backward_threads = 256;

template <class T>
struct Forward {
  Sizes sizes;
  Rows<const T> x, residual;
  Rows<T> y, h;
  Parameter gain, bias;
  float *mean, *rstd;  // mean: null for RMSNorm
  int width, team;
  float eps;
};

// One team, one row. Bytes: x read, y written; with a residual, that read and h written too. Gains come out of the
// caches. The h that is normalised is the h that is written, rounded to T.
template <class T, int n, int chunks>
__global__ void __launch_bounds__(most_threads<n, chunks>, 1) forward(const __grid_constant__ Forward<T> p) {
  __shared__ float slots[2][most_warps];
  const Team team(p.team);
  const int row = blockIdx.x * team.count + team.index;
  const bool there = row < p.sizes.rows;  // a team without a row has one of no width: it meets the others at the sums
  const Place at = p.sizes.place(there ? row : 0);
  const Span<T, n> span{there ? p.width : 0, team.size, team.rank};

  Bits<T, n> bits[chunks];
  span.load(p.x.at(at), bits);
  if (p.residual.data) {
    Bits<T, n> other[chunks];
    span.load(p.residual.at(at), other);
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      float x[n], y[n];
      unpack<T, n>(bits[c], x);
      unpack<T, n>(other[c], y);
#pragma unroll
      for (int j = 0; j < n; ++j) x[j] += y[j];
      span.store(p.h.at(at), c, x);
      bits[c] = pack<T, n>(x);
    }
  }

  float mean = 0.f, sum = 0.f;
  if (p.mean) {
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
      float x[n];
      unpack<T, n>(bits[c], x);
#pragma unroll
      for (int j = 0; j < n; ++j) sum += x[j];
    }
    mean = team.sum(sum, slots[0]) / float(p.width);
    sum = 0.f;
  }
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    float x[n];
    unpack<T, n>(bits[c], x);
    if (!span.inside(c)) continue;
#pragma unroll
    for (int j = 0; j < n; ++j) sum += (x[j] - mean) * (x[j] - mean);
  }
  const float rstd = 1.f / sqrtf(team.sum(sum, slots[1]) / float(p.width) + p.eps);
  if (there && team.rank == 0) {
    p.rstd[row] = rstd;
    if (p.mean) p.mean[row] = mean;
  }

#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    if (!span.inside(c)) continue;
    float x[n], parameter[n];
    unpack<T, n>(bits[c], x);
#pragma unroll
    for (int j = 0; j < n; ++j) x[j] = (x[j] - mean) * rstd;
    if (p.gain.data) {
      span.load(p.gain, c, parameter);
#pragma unroll
      for (int j = 0; j < n; ++j) x[j] *= parameter[j];
    }
    if (p.bias.data) {
      span.load(p.bias, c, parameter);
#pragma unroll
      for (int j = 0; j < n; ++j) x[j] += parameter[j];
    }
    span.store(p.y.at(at), c, x);
  }
}

template <class T>
struct Backward {
  Sizes sizes;
  Rows<const T> d_y, d_h, h;
  Rows<T> d_x;
  Parameter gain;
  const float *mean, *rstd;
  float* partials;  // (blocks, 1 or 2, padded): sums of a block's rows, for the gain and, if `of_bias`, for the bias
  int width, padded, team;
  bool of_bias;
};

// What the block's rows add to the gradients of gain and bias, in shared memory: of each thread its own columns, so
// that nobody waits for anybody until the last row. Four neighbours of a thread, then the threads: no bank conflicts.
template <int n>
struct Sums {
  static constexpr int m = n < 4 ? n : 4;  // neighbours
  float* sums;
  int chunks, threads;

  __device__ __forceinline__ float* at(int which, int c, int j, int thread) const {
    return sums + (((which * chunks + c) * n + j) / m * threads + thread) * m;
  }
  __device__ __forceinline__ void add(int which, int c, const float (&x)[n]) const {
#pragma unroll
    for (int j = 0; j < n; j += m) {
      float* const to = at(which, c, j, threadIdx.x);
      float sum[m];
      unpack<float, m>(*reinterpret_cast<Bits<float, m>*>(to), sum);
#pragma unroll
      for (int k = 0; k < m; ++k) sum[k] += x[j + k];
      *reinterpret_cast<Bits<float, m>*>(to) = pack<float, m>(sum);
    }
  }
};

// The sums of the block's teams, first to last, go to the block's row of `partials`.
template <int n, class Problem>
__device__ __forceinline__ void write_partials(const Problem& p, const Sums<n>& sums, const Team& team) {
  constexpr int m = Sums<n>::m;
  const int kinds = p.of_bias ? 2 : 1, of_kind = sums.chunks * (n / m) * team.size;
#pragma unroll 1
  for (int i = threadIdx.x; i < kinds * of_kind; i += blockDim.x) {
    const int which = i / of_kind, rank = i % team.size, first = i % of_kind / team.size * m;  // element of a thread
    const int column = (first / n * team.size + rank) * n + first % n;
    if (column >= p.width) continue;
    float sum[m] = {};
    for (int t = 0; t < team.count; ++t) {
      float more[m];
      const float* const from = sums.at(which, first / n, first % n, t * team.size + rank);
      unpack<float, m>(*reinterpret_cast<const Bits<float, m>*>(from), more);
#pragma unroll
      for (int k = 0; k < m; ++k) sum[k] += more[k];
    }
    float* const to = p.partials + (int64_t(blockIdx.x) * kinds + which) * p.padded + column;
    *reinterpret_cast<Bits<float, m>*>(to) = pack<float, m>(sum);
  }
}

// Blocks stay and take every gridDim-th group of rows. With hat = (h - mean) * rstd and w = gain * d_y:
//   d_x = rstd * (w - hat * mean(w * hat) - mean(w)) + d_h        RMSNorm: without the last mean
// Bytes: h and d_y (and d_h) read, d_x written. d_h is read late: it is in no sum, and registers are short.
template <class T, int n, int chunks>
__global__ void __launch_bounds__(most_threads<n, chunks>, 1) backward(const __grid_constant__ Backward<T> p) {
  __shared__ float slots[2][2][most_warps];
  const Team team(p.team);
  const Sums<n> sums{&simt::dynamic_shared<float>(), chunks, int(blockDim.x)};
  if (p.partials) {
    const int all = (p.of_bias ? 2 : 1) * chunks * n * int(blockDim.x);
    for (int i = threadIdx.x; i < all; i += blockDim.x) sums.sums[i] = 0.f;
    __syncthreads();
  }

  int turn = 0;
#pragma unroll 1
  for (int64_t group = blockIdx.x; group * team.count < p.sizes.rows; group += gridDim.x, turn ^= 1) {
    const int64_t wanted = group * team.count + team.index;
    const bool there = wanted < p.sizes.rows;
    const int row = there ? int(wanted) : 0;
    const Place at = p.sizes.place(row);
    const Span<T, n> span{there ? p.width : 0, team.size, team.rank};
    Bits<T, n> h_bits[chunks], d_y_bits[chunks];
    if constexpr (n > 1) {
      span.load(p.h.at(at), h_bits);
      span.load(p.d_y.at(at), d_y_bits);
    }
    const auto read = [&](const Span<T, n>& from, int c, float (&h)[n], float (&d_y)[n]) {
      if constexpr (n > 1) {
        unpack<T, n>(h_bits[c], h);
        unpack<T, n>(d_y_bits[c], d_y);
      } else {  // single elements: twice from memory, the second time from a cache
        from.load({p.h.at(at), false}, c, h);
        from.load({p.d_y.at(at), false}, c, d_y);
      }
    };
    const float mean = p.mean ? p.mean[row] : 0.f, rstd = p.rstd[row];

    float along = 0.f, level = 0.f;  // the sums of w * hat and of w
#pragma unroll(n == 1 ? 4 : chunks)
    for (int c = 0; c < chunks; ++c) {
      if (!span.inside(c)) continue;
      float h[n], w[n], gain[n];
      read(span, c, h, w);
      if (p.gain.data) {
        span.load(p.gain, c, gain);
#pragma unroll
        for (int j = 0; j < n; ++j) w[j] *= gain[j];
      }
#pragma unroll
      for (int j = 0; j < n; ++j) {
        along += w[j] * ((h[j] - mean) * rstd);
        level += w[j];
      }
    }
    along = team.sum(along, slots[turn][0]) / float(p.width);
    level = p.mean ? team.sum(level, slots[turn][1]) / float(p.width) : 0.f;

    // The same columns again, but the compiler does not know: it would keep all their addresses in registers.
    const Span<T, n> again{span.width, int(ptx::uniform(team.size)), team.rank};
#pragma unroll(n == 1 ? 4 : chunks)
    for (int c = 0; c < chunks; ++c) {
      if (!again.inside(c)) continue;
      float hat[n], d_x[n], other[n];
      read(again, c, hat, d_x);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        hat[j] = (hat[j] - mean) * rstd;
        other[j] = d_x[j] * hat[j];
      }
      if (p.partials) sums.add(0, c, other);
      if (p.of_bias) sums.add(1, c, d_x);
      if (p.gain.data) {
        again.load(p.gain, c, other);
#pragma unroll
        for (int j = 0; j < n; ++j) d_x[j] *= other[j];
      }
#pragma unroll
      for (int j = 0; j < n; ++j) d_x[j] = rstd * (d_x[j] - hat[j] * along - level);
      if (p.d_h.data) {
        again.load({p.d_h.at(at), false}, c, other);
#pragma unroll
        for (int j = 0; j < n; ++j) d_x[j] += other[j];
      }
      again.store(p.d_x.at(at), c, d_x);
    }
  }
  if (!p.partials) return;
  __syncthreads();
  write_partials(p, sums, team);
}

// A gradient of gain or bias: partials (blocks, kinds, padded) summed over the blocks, in an order that never changes.
// 32 columns a block, of which a warp reads 128 bytes in every 16th row. Bytes: the partials, which are in L2.
constexpr int columns = 32, lines = 16;
struct Total {
  const float* partials;
  void* d_gain;
  void* d_bias;
  int blocks, kinds, padded, width;
};
template <class T>
__global__ void __launch_bounds__(columns * lines) add_partials(const __grid_constant__ Total p) {
  __shared__ float sums[lines][columns];
  const int x = threadIdx.x % columns, y = threadIdx.x / columns, column = blockIdx.x * columns + x, which = blockIdx.y;
  float sum = 0.f;
  if (column < p.width)
#pragma unroll 4
    for (int b = y; b < p.blocks; b += lines) sum += p.partials[(int64_t(b) * p.kinds + which) * p.padded + column];
  sums[y][x] = sum;
  __syncthreads();
  if (y > 0 || column >= p.width) return;
#pragma unroll
  for (int i = 1; i < lines; ++i) sum += sums[i][x];
  static_cast<T*>(which == 0 ? p.d_gain : p.d_bias)[column] = T(sum);
}

// ---- host ----------------------------------------------------------------------------------------------------------
void expect_width(const View& x, int most) {
  const int64_t width = width_of(x);
  if (width < 1 || width > most)
    x.refuse("rows of " + std::to_string(width) + " elements: expected 1 to " + std::to_string(most) +
             (most == widest_row<1> ? " where rows do not start at multiples of 16 bytes" : ""));
}

// One float32 for each row; null if there is none.
float* statistic(const View* s, int rows) {
  if (!s) return nullptr;
  return s->expect_type({DataType::f32}).expect_shape({rows}).expect_contiguous().as<float>();
}

void run_forward(const native::Arguments& given) {
  const View &x = given.array("x"), &y = given.array("y");
  const View *residual = given.optional("residual"), *h = given.optional("h");
  const View *gain = given.optional("gain"), *bias = given.optional("bias");
  const Sizes sizes = sizes_of(x);
  if ((residual != nullptr) != (h != nullptr))
    (residual ? residual : h)->refuse("residual and h: expected both or none");
  if (sizes.rows == 0) return;
  with_chunk(x.type, aligned(width_of(x), {&x, residual, &y, h, gain, bias}), [&](auto element, auto size) {
    using T = decltype(element);
    constexpr int n = size;
    expect_width(x, widest_row<n>);
    const int width = int(width_of(x));
    const Plan plan = plan_of<n>(width, forward_threads);
    const Forward<T> p = {sizes, rows_of<const T>(&x, x, width), rows_of<const T>(residual, x, width),
                          rows_of<T>(&y, x, width), rows_of<T>(h, x, width),
                          parameter_of(gain, x), parameter_of(bias, x),
                          statistic(given.optional("mean"), sizes.rows), statistic(&given.array("rstd"), sizes.rows),
                          width, plan.team, float(given.number("eps"))};
    with_count<n>(plan.chunks, [&](auto chunks) {
      const auto launch = launch_of(divide_up(sizes.rows, plan.teams), plan.threads(), given.stream);
      simt::launch(forward<T, n, chunks>, launch, p);
    });
  });
}

void run_backward(const native::Arguments& given) {
  const View &h = given.array("h"), &d_y = given.array("d_y"), &d_x = given.array("d_x");
  const View *d_h = given.optional("d_h"), *gain = given.optional("gain"), *partials = given.optional("partials");
  const View *d_gain = given.optional("d_gain"), *d_bias = given.optional("d_bias");
  const Sizes sizes = sizes_of(h);
  parameter_of(d_gain, h), parameter_of(d_bias, h);
  if ((d_gain != nullptr) != (partials != nullptr) || (d_bias && !d_gain))
    throw std::invalid_argument("d_gain: expected it together with partials, and with d_bias");
  if (d_bias && d_bias->type != d_gain->type) d_bias->refuse("expected the type of d_gain");
  if (sizes.rows == 0) h.refuse("shape " + h.shape() + ": expected at least one row");
  with_chunk(h.type, aligned(width_of(h), {&h, &d_y, d_h, &d_x, gain}), [&](auto element, auto size) {
    using T = decltype(element);
    constexpr int n = size;
    expect_width(h, widest_row<n>);
    const int width = int(width_of(h)), kinds = d_bias ? 2 : 1, padded = int(divide_up(width, 4)) * 4;
    const Plan plan = plan_of<n>(width, backward_threads);
    int64_t blocks = divide_up(sizes.rows, plan.teams);
    size_t shared = sizeof(float);
    if (partials) {
      partials->expect_rank(3).expect_type({DataType::f32}).expect_contiguous().expect_aligned(16);
      partials->expect_shape({partials->size[0], kinds, padded});
      // Blocks that a multiprocessor holds at once, and not more: fewer where they are larger.
      const int64_t most = partials->size[0] * backward_threads / std::max(plan.threads(), backward_threads);
      blocks = std::min(blocks, std::max<int64_t>(most, 1));
      if (partials->size[0] < blocks) partials->refuse("shape " + partials->shape() + ": expected at least one block");
      shared = size_t(plan.threads()) * plan.chunks * n * sizeof(float) * kinds;
    }
    const Backward<T> p = {sizes, rows_of<const T>(&d_y, h, width), rows_of<const T>(d_h, h, width),
                           rows_of<const T>(&h, h, width), rows_of<T>(&d_x, h, width), parameter_of(gain, h),
                           statistic(given.optional("mean"), sizes.rows), statistic(&given.array("rstd"), sizes.rows),
                           partials ? partials->as<float>() : nullptr, width, padded, plan.team,
                           d_bias != nullptr};
    with_count<n>(plan.chunks, [&](auto chunks) {
      simt::launch(backward<T, n, chunks>, launch_of(blocks, plan.threads(), given.stream, shared), p);
    });
    if (!partials) return;
    const Total total = {p.partials, d_gain->data, d_bias ? d_bias->data : nullptr, int(blocks), kinds, padded, width};
    simt::Launch launch = launch_of(divide_up(width, columns), columns * lines, given.stream);
    launch.grid.y = unsigned(kinds);
    with_type(d_gain->type, [&](auto of_gain) { simt::launch(add_partials<decltype(of_gain)>, launch, total); });
  });
}

const native::Operation forward_operation("norm_forward", run_forward);
const native::Operation backward_operation("norm_backward", run_backward);

}  // namespace
}  // namespace norm
}  // namespace fused
