// Gradients of A and B in lora_sgmv: grad = scale * left^T x over all rows of an adapter, (ranks, columns), where left
// is dy B or x A^T, in float32. 0 past the rank, and for an adapter that has no row.
//
// A block has 64 columns and 16 or 64 ranks of one adapter, looks for that adapter's segments, and goes over their rows
// in order: the same bits every time. Both tiles lie across the sum; of 16-bit types left is split in two as in
// lora_segments.cu. One adapter of few columns fills no GPU: rows are not shared among blocks.
#include "fused/lora_tile.cuh"

namespace fused {
namespace lora {
namespace {

// The rows of one adapter, `most` of one segment at a time. The same in all threads.
template <int most>
struct RowsOf {
  const Segments& segments;
  const int32_t* const indices;
  const int adapter;
  int next = 0, row = 0, end = 0;  // the segment to look at next; what is left of the one before
  unsigned found = 0;              // of segments next - 32 to next - 1, those of this adapter that are to come

  // Rows `first` on, of which there are as many as it returns: none at the end. By the whole warp.
  PTX_INLINE int take(int& first) {
#pragma unroll 1
    while (row >= end) {
      if (!found) {
        if (next >= segments.count) return 0;
        const int at = next + threadIdx.x % 32;
        found = __ballot_sync(0xffffffff, at < segments.count && indices[at] == adapter);
        next += 32;
        continue;
      }
      const int segment = next - 32 + __ffs(int(found)) - 1;
      found &= found - 1;
      row = segments.starts[segment], end = segments.starts[segment + 1];
    }
    first = row;
    row += most;
    return min(most, end - first);
  }
};

template <class T, int rows>
struct alignas(128) OuterRing {
  static constexpr int stages = 3, parts = sizeof(T) == 2 ? 2 : 1;
  T left[stages][parts * slice<T> * tile_columns], x[stages][slice<T> * tile_columns];
  float patch[4][16 * WarpTile<rows>::pitch];
};

template <class T, int rows>
__global__ void __launch_bounds__(tile_threads, 4)
    outer(Matrix<const T> x, Between between, Segments segments, Adapters adapters, Matrix<T> grad, int64_t grad_step,
          int width) {
  using Ring = OuterRing<T, rows>;
  constexpr int n = per_chunk<T>, runs = WarpTile<rows>::columns / n;
  const int column = blockIdx.x * tile_columns, adapter = blockIdx.y, first_rank = blockIdx.z * rows;
  const int ranks = min(rows, adapters.rank(adapter) - first_rank);
  auto& ring = simt::dynamic_shared<Ring>();
  RowsOf<slice<T>> all{segments, adapters.indices, adapter};
  Between left = between;
  left.data += first_rank;
  // Rows of the stages that are full, or 0: how many there are in each.
  int many[Ring::stages];
  const auto copy = [&](int stage) {
    int first = 0;
    const int here = ranks > 0 ? all.take(first) : 0;
    if (here) {
      copy_tile<slice<T>, tile_columns>(ring.x[stage], x.at(first, column), x.row, x.column, here, width - column,
                                        x.wide);
      load_between<T, slice<T>, tile_columns>(ring.left[stage], left, first, here, ranks, rows);
    }
    ptx::cp_async_commit_group();
    return here;
  };

  Sums<rows> sum;
  sum.clear();
#pragma unroll
  for (int stage = 0; stage < Ring::stages - 1; ++stage) many[stage] = copy(stage);
  bool more = true;
#pragma unroll 1
  while (more) {
#pragma unroll
    for (int stage = 0; stage < Ring::stages; ++stage) {
      ptx::cp_async_wait_group<Ring::stages - 2>();
      __syncthreads();  // this stage is there, and nobody reads the one before
      if (many[stage] == 0) {
        more = false;
        break;
      }
      const int free = (stage + Ring::stages - 1) % Ring::stages;
      many[free] = copy(free);
      multiply<rows, tile_columns, true, false, Ring::parts>(sum, ring.left[stage], 0, slice<T> * tile_columns,
                                                             ring.x[stage], many[stage], width - column);
    }
  }
  ptx::cp_async_wait_group<0>();

  const WarpTile<rows> mine;
#pragma unroll
  for (int i = 0; i < 8; ++i)  // past the rank may be NaNs of x
#pragma unroll
    for (int g = 0; g < WarpTile<rows>::groups; ++g)
      if (mine.row + row_of<T>(i & 6) >= ranks) sum.of[g][i] = 0.f;
  float* const patch = ring.patch[mine.warp];
  keep<T>(sum, patch);
  __syncwarp();
  const float scale = adapters.scales[adapter];
  grad.data += adapter * grad_step;
#pragma unroll 1
  for (int i = mine.lane; i < 16 * runs; i += 32) {
    const int r = mine.row + i / runs, at = column + mine.column + i % runs * n;
    if (first_rank + r < adapters.most && at < width)
      store_run(grad, first_rank + r, at, width, patch + i / runs * WarpTile<rows>::pitch + i % runs * n, scale, false);
  }
}

template <class T, int rows>
void start(const View& x, const Between& between, const Segments& segments, const Adapters& adapters, const View& grad,
           void* stream) {
  const int width = int(x.size[1]);
  if (adapters.count > 65535) grad.refuse("shape " + grad.shape() + ": expected at most 65535 adapters");
  simt::Launch shape{dim3(unsigned(divide_up(width, tile_columns)), unsigned(adapters.count),
                          unsigned(divide_up(adapters.most, rows))),
                     dim3(tile_threads), sizeof(OuterRing<T, rows>)};
  shape.stream = stream;
  const Matrix<T> matrix{grad.as<T>(), grad.stride[1], grad.stride[2], in_chunks(grad, 2, true)};
  simt::launch(outer<T, rows>, shape, matrix_of<const T>(x, false), between, segments, adapters, matrix, grad.stride[0],
               width);
}

}  // namespace

void run_outer(const View& x, const Between& between, const Segments& segments, const Adapters& adapters,
               const View& grad, void* stream) {
  grad.expect_rank(3).expect_type({x.type}).expect_writable();
  grad.expect_shape({adapters.count, adapters.most, x.size[1]});
  with_type(x.type, [&](auto type) {
    using T = decltype(type);
    (adapters.most <= 16 ? start<T, 16> : start<T, 64>)(x, between, segments, adapters, grad, stream);
  });
}

}  // namespace lora
}  // namespace fused
