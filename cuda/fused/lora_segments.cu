// lora_sgmv: rows sorted by adapter, as in prefill and training. Products of tiles, on tensor cores but in float32.
//
// Each segment of rows of one adapter is cut into tiles of 64 rows, or of 16 where segments are short; a block finds
// its tile in the list of segments itself, so that nothing waits for the GPU. Shrink: x A^T of a tile, over all of x's
// columns or a part of them, a ring of copies ahead. Expand: x A^T is read once, its parts added up; of 16-bit types it
// is split into two numbers of 16 bits, so that its first 16 bits or more count (a large one that becomes infinite as a
// float16 stays so); then a block goes over up to 512 columns of y. Either factor may lie along the ranks or across:
// the gradient of x (lora_sgmv_backward) is the same with B and A in each other's place, both turned. What is refused
// stands in lora.cuh and cuda/lora_ops.py.
#include <algorithm>

#include "fused/lora_tile.cuh"

namespace fused {
namespace lora {
namespace {

template <class T, int rows>
struct alignas(128) ShrinkRing {
  static constexpr int stages = 3;
  T x[stages][rows * slice<T>], a[stages][tile_columns * slice<T>];
};

// between[blockIdx.y] of a tile of rows, 64 ranks from 64 blockIdx.z on, over `share` columns of x.
template <class T, int rows, bool along>
__global__ void __launch_bounds__(tile_threads, 4)
    shrink(Matrix<const T> x, Pool<T> a, Segments segments, Adapters adapters, Between between, int width, int share) {
  using Ring = ShrinkRing<T, rows>;
  const RowTile tile = RowTile::find<rows>(segments, blockIdx.x);
  const int adapter = adapters.indices[tile.segment];
  if (tile.rows == 0 || adapter < 0) return;
  const int first_rank = blockIdx.z * tile_columns, ranks = adapters.rank(adapter) - first_rank;
  if (ranks <= 0) return;
  const int begin = min(int(blockIdx.y) * share, width), end = min(begin + share, width);
  const int steps = (end - begin + slice<T> - 1) / slice<T>;
  auto& ring = simt::dynamic_shared<Ring>();
  const auto copy = [&](int step) {
    const int k = begin + step * slice<T>, stage = step % Ring::stages;
    if (step < steps) {
      copy_tile<rows, slice<T>>(ring.x[stage], x.at(tile.first, k), x.row, x.column, tile.rows, end - k, x.wide);
      copy_weights<T, along>(ring.a[stage], a.at(adapter, first_rank, k), a.rank, a.column, ranks, end - k, a.wide);
    }
    ptx::cp_async_commit_group();
  };

  Sums<rows> sum;
  sum.clear();
#pragma unroll 1
  for (int step = 0; step < Ring::stages - 1; ++step) copy(step);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait_group<Ring::stages - 2>();
    __syncthreads();  // this stage is there, and nobody reads the one before
    copy(step + Ring::stages - 1);
    const int stage = step % Ring::stages;
    multiply<rows, slice<T>, false, along, 1>(sum, ring.x[stage], 0, 0, ring.a[stage], end - begin - step * slice<T>,
                                              ranks);
  }
  ptx::cp_async_wait_group<0>();

  const WarpTile<rows> mine;
#pragma unroll
  for (int g = 0; g < WarpTile<rows>::groups; ++g)
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // up to the next multiple of 4: the expand reads so many
      const int row = mine.row + row_of<T>(i & 6);
      const int r = mine.column + 16 * g + column_of<T>(i & 6) + i % 2 * (sizeof(T) == 2 ? 1 : 8);
      if (row < tile.rows && r < (ranks + 3) / 4 * 4)
        *between.at(blockIdx.y, tile.first + row, first_rank + r) = r < ranks ? sum.of[g][i] : 0.f;
    }
}

template <class T, int rows, int depth>
struct alignas(128) ExpandShared {
  static constexpr int parts = sizeof(T) == 2 ? 2 : 1, stages = rows * depth > 4096 ? 2 : 3;
  T left[parts][rows * depth], b[stages][tile_columns * slice<T>];
  float patch[4][16 * WarpTile<rows>::pitch];
};

// `share` columns of y of a tile of rows. depth: ranks at most.
template <class T, int rows, int depth, bool along>
__global__ void __launch_bounds__(tile_threads, 4)
    expand(Between between, Pool<T> b, Segments segments, Adapters adapters, Matrix<T> y, int width, int share,
           bool add) {
  using Shared = ExpandShared<T, rows, depth>;
  constexpr int n = per_chunk<T>, runs = WarpTile<rows>::columns / n;
  const RowTile tile = RowTile::find<rows>(segments, blockIdx.x);
  const int adapter = adapters.indices[tile.segment], rank = adapter < 0 ? 0 : adapters.rank(adapter);
  if (tile.rows == 0 || (rank == 0 && add)) return;
  const int begin = blockIdx.y * share, end = min(begin + share, width);
  const int slices = (rank + slice<T> - 1) / slice<T>, steps = (end - begin + tile_columns - 1) / tile_columns * slices;
  auto& shared = simt::dynamic_shared<Shared>();
  const auto copy = [&](int step) {
    if (step < steps) {
      const int column = begin + step / slices * tile_columns, r = step % slices * slice<T>;
      copy_weights<T, along>(shared.b[step % Shared::stages], b.at(adapter, r, column), b.column, b.rank, end - column,
                             rank - r, b.wide);
    }
    ptx::cp_async_commit_group();
  };
#pragma unroll 1
  for (int step = 0; step < Shared::stages - 1; ++step) copy(step);
  load_between<T, rows, depth>(shared.left[0], between, tile.first, tile.rows, rank, slices * slice<T>);
  const float scale = rank ? adapters.scales[adapter] : 0.f;
  const WarpTile<rows> mine;
  float* const patch = shared.patch[mine.warp];
  const auto store = [&](const Sums<rows>& sum, int column) {
    __syncwarp();
    keep<T>(sum, patch);
    __syncwarp();
#pragma unroll 1
    for (int i = mine.lane; i < 16 * runs; i += 32) {
      const int row = mine.row + i / runs, at = column + mine.column + i % runs * n;
      if (row < tile.rows && at < end)
        store_run(y, tile.first + row, at, end, patch + i / runs * WarpTile<rows>::pitch + i % runs * n, scale, add);
    }
  };

  Sums<rows> sum;
  sum.clear();
  if (steps == 0)
    for (int column = begin; column < end; column += tile_columns) store(sum, column);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait_group<Shared::stages - 2>();
    __syncthreads();  // as above; and the first time, x A^T is there
    copy(step + Shared::stages - 1);
    const int column = begin + step / slices * tile_columns, r = step % slices * slice<T>;
    multiply<rows, depth, false, along, Shared::parts>(sum, shared.left[0], r, rows * depth,
                                                       shared.b[step % Shared::stages], rank - r, end - column);
    if (r + slice<T> >= rank) {
      store(sum, column);
      sum.clear();
    }
  }
  ptx::cp_async_wait_group<0>();
}

// ---- host -----------------------------------------------------------------------------------------------------------

struct Plan {
  Segments segments;
  int rows, tiles;
  void* stream;

  // 64 rows a tile where segments have half of that on average. As many tiles as there can be: those that are none end
  // at once.
  Plan(const Arguments& given, int64_t all_rows) : stream(given.stream) {
    const View& starts = given.array("segments").expect_type({DataType::i32}).expect_rank(1).expect_contiguous();
    if (starts.size[0] < 2 || starts.size[0] > 4097)
      starts.refuse("shape " + starts.shape() + ": expected the bounds of 1 to 4096 segments");
    segments = {starts.as<int32_t>(), int(starts.size[0]) - 1};
    rows = all_rows >= int64_t(32) * segments.count ? 64 : 16;
    tiles = int(all_rows / rows + segments.count);
  }
};

template <class T, int rows, bool along>
void start_shrink(const Given& p, const Plan& plan) {
  const Between between = p.parts();
  const int share = int(divide_up(divide_up(p.width, between.parts), slice<T>) * slice<T>);
  simt::Launch shape{dim3(plan.tiles, between.parts, unsigned(divide_up(p.most, tile_columns))), dim3(tile_threads)};
  shape.shared_bytes = sizeof(ShrinkRing<T, rows>);
  shape.stream = plan.stream;
  simt::launch(shrink<T, rows, along>, shape, matrix_of<const T>(p.x, false), pool_of<T>(p.a, !along, false),
               plan.segments, p.adapters, between, p.width, share);
}

template <class T, int rows, int depth, bool along>
void start_expand(const Given& p, const Plan& plan, const View& y, bool add) {
  int share = 512;  // fewer where there would be less than two blocks for each multiprocessor
  while (share > tile_columns && plan.tiles * divide_up(p.out, share) < 2 * simt::multiprocessors()) share /= 2;
  if (divide_up(p.out, share) > 65535) y.refuse("shape " + y.shape() + ": expected less columns");
  simt::Launch shape{dim3(plan.tiles, unsigned(divide_up(p.out, share))), dim3(tile_threads)};
  shape.shared_bytes = sizeof(ExpandShared<T, rows, depth>);
  shape.stream = plan.stream;
  simt::launch(expand<T, rows, depth, along>, shape, p.parts(), pool_of<T>(p.b, along, false), plan.segments,
               p.adapters, matrix_of<T>(y), p.out, share, add);
}

void run_shrink(const Given& p, const Plan& plan) {
  const bool along = p.a.stride[2] == 1 || p.a.stride[1] != 1;
  with_type(p.x.type, [&](auto type) {
    using T = decltype(type);
    if (plan.rows == 64) (along ? start_shrink<T, 64, true> : start_shrink<T, 64, false>)(p, plan);
    else (along ? start_shrink<T, 16, true> : start_shrink<T, 16, false>)(p, plan);
  });
}

void run_expand(const Given& p, const Plan& plan, const View& y, bool add) {
  const bool along = p.b.stride[1] == 1 || p.b.stride[2] != 1;
  with_type(p.x.type, [&](auto type) {
    using T = decltype(type);
    const auto start = [&](auto rows, auto depth) {
      constexpr int r = rows, d = depth;
      (along ? start_expand<T, r, d, true> : start_expand<T, r, d, false>)(p, plan, p.check(y), add);
    };
    if (plan.rows == 16) start(Constant<16>(), Constant<256>());
    else if (p.most <= 64) start(Constant<64>(), Constant<64>());  // leaves room for three blocks beside each other
    else start(Constant<64>(), Constant<256>());
  });
}

void run_forward(const Arguments& given) {
  const View &x = given.array("x").expect_rank(2), &a = given.array("a_pool"), &b = given.array("b_pool");
  const Plan plan(given, x.size[0]);
  const Given p(given, plan.segments.count, x, a, turned(b), "workspace");
  run_shrink(p, plan);
  run_expand(p, plan, given.array("y"), given.flag("add"));
}

// Of x: dy B A. Of A: (dy B)^T x. Of B: dy^T (x A^T), with x A^T computed again: it is one reading of x.
void run_backward(const Arguments& given) {
  const View &x = given.array("x").expect_rank(2), &dy = given.array("dy"), &a = given.array("a_pool");
  const View *const dx = given.optional("dx"), *const da = given.optional("da_pool");
  const View* const db = given.optional("db_pool");
  const View b = turned(given.array("b_pool"));
  const Plan plan(given, x.size[0]);
  if (dx || da) {
    const Given p(given, plan.segments.count, dy, b, a, "workspace_dy");
    run_shrink(p, plan);
    if (dx) run_expand(p, plan, *dx, false);
    if (da) run_outer(p.check_like(x), p.parts(), plan.segments, p.adapters, *da, plan.stream);
  }
  if (db) {
    const Given p(given, plan.segments.count, x, a, b, "workspace_x");
    run_shrink(p, plan);
    run_outer(p.check_like(dy), p.parts(), plan.segments, p.adapters, turned(*db), plan.stream);
  }
}

const native::Operation forward_operation("lora_sgmv", run_forward);
const native::Operation backward_operation("lora_sgmv_backward", run_backward);

}  // namespace
}  // namespace lora
}  // namespace fused
