// Step 16: the family. What step 15 still lost, and what is done about it:
//   - both consumers finish a tile together, and while they store nothing is multiplied. Here one starts a stage
//     ahead and stays ahead: the tensor cores are busy with the other's last stages during its epilogue, and the
//     other way round
//   - a patch of tiles that runs at one time shares nothing with the next patch but one side. Along a Hilbert curve
//     both the rows and the columns that were just read are used again, as long as L2 still has them. Raster 0 walks
//     the curve, other rasters walk groups of rows as before. The producer walks and tells the consumers
//   - one shape fits few sizes: 4096 has 512 tiles of 128 x 256, 97 % of four rounds of 132, but 1024 has 32, a
//     quarter of one. So the tile is a template, and 16_split.cuh cuts k where even small tiles are too few
//   - d is written once and not read again: it may leave L2 first, so that A and B stay
// The kernel opens with what needs no data of the grid before it (barriers, tensor maps) and may do so while that grid
// still runs: the launch overlaps.
#pragma once
#include "matmul/hopper_store.cuh"

namespace matmul::best {

using hopper::divide_up;
using hopper::tile_k;

// The index-th cell of a generalised Hilbert curve over width x height cells: neighbours on the curve are neighbours
// in the plane. The rectangle, spanned by `a` (w cells) and `b` (h cells), is halved if it is long, else cut into a
// way up, a way across and a way down, until it is a line.
struct Cell {
  int x, y;
};
PTX_INLINE Cell hilbert(int width, int height, int index) {
  int w = width, h = height, x = 0, y = 0, ax = 1, ay = 0, bx = 0, by = 1;
  if (height > width) w = height, h = width, ax = 0, ay = 1, bx = 1, by = 0;
  while (w > 1 && h > 1) {
    int half_w = w / 2, half_h = h / 2;
    if (2 * w > 3 * h) {
      half_w += half_w % 2 && w > 2;  // even steps end on the side where they began
      if (index < half_w * h) {
        w = half_w;
      } else {
        index -= half_w * h;
        x += ax * half_w, y += ay * half_w, w -= half_w;
      }
      continue;
    }
    half_h += half_h % 2 && h > 2;
    const int up = half_h * half_w, across = w * (h - half_h);
    if (index < up) {
      const int old_x = ax, old_y = ay;
      ax = bx, ay = by, bx = old_x, by = old_y, w = half_h, h = half_w;
    } else if (index < up + across) {
      index -= up;
      x += bx * half_h, y += by * half_h, h -= half_h;
    } else {
      index -= up + across;
      x += ax * (w - 1) + bx * (half_h - 1), y += ay * (w - 1) + by * (half_h - 1);
      const int old_x = ax, old_y = ay;
      ax = -bx, ay = -by, bx = -old_x, by = -old_y;
      h = w - half_w, w = half_h;
    }
  }
  return h == 1 ? Cell{x + ax * index, y + ay * index} : Cell{x + bx * index, y + by * index};
}

struct Schedule {
  int raster, stagger;
  ptx::CacheHint a, b, d;
  static ptx::CacheHint hint(Cache cache) {
    return cache == Cache::first ? ptx::CacheHint::evict_first
                                 : cache == Cache::last ? ptx::CacheHint::evict_last : ptx::CacheHint::evict_normal;
  }
  static Schedule of(const Tiling& t) {
    return {t.raster, t.stagger, hint(t.cache_a), hint(t.cache_b), hint(t.cache_d)};
  }
};

// `tile_m` counts all rows of a cluster.
template <int tile_m, int tile_n>
PTX_INLINE hopper::Tile tile_at(const hopper::Sizes& sizes, int raster, int index) {
  if (raster > 0) return hopper::tile_in_groups<tile_m, tile_n>(sizes, raster, index);
  const int down = divide_up(sizes.m, tile_m), across = divide_up(sizes.n, tile_n), tiles = down * across;
  const Cell cell = hilbert(across, down, index % tiles);
  return {cell.y * tile_m, cell.x * tile_n, index / tiles};
}

template <class In, int consumers_, int tile_n_, int cluster_>
struct Shape {
  static constexpr int consumers = consumers_, tile_m = 64 * consumers, tile_n = tile_n_, cluster = cluster_;
  static constexpr int threads = (consumers + 1) * hopper::warpgroup;
  static constexpr int stage_bytes = (tile_m + tile_n) * tile_k * int(sizeof(In));
  static constexpr int boxes = consumers == 3 ? 1 : tile_n == 192 ? 3 : 2;  // a warp
  static constexpr int budget = 227 * 1024 - 1024 - consumers * 4 * boxes * hopper::Boxes<1>::bytes;
  static constexpr int stages = budget / stage_bytes < 8 ? budget / stage_bytes : 8;
  // Registers a thread: what a block starts with (65536 shared by all), and how they are spread afterwards.
  static constexpr int producer_registers = 40, consumer_registers = consumers == 3 ? 152 : 232;

  struct Shared {
    alignas(1024) In a[stages][tile_m * tile_k];
    alignas(1024) In b[stages][tile_n * tile_k];
    hopper::Boxes<boxes> box[consumers * 4];
    hopper::Tile tile[stages];  // which one the stage begins
    uint64_t full[stages], empty[stages];
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "shared memory of a block");
};

template <class S, bool a_mn_major, bool b_mn_major>
PTX_INLINE void produce(typename S::Shared& shared, const CUtensorMap* map_a, const CUtensorMap* map_b,
                        const hopper::Sizes& sizes, const Schedule& schedule, int tiles, int rank) {
  constexpr int part = S::tile_n / S::cluster;  // of B, that this block loads for all
  const int steps = divide_up(sizes.k, tile_k);
  hopper::Cursor<S::stages> cursor;
  for (int index = blockIdx.x / S::cluster; index < tiles; index += gridDim.x / S::cluster) {
    const hopper::Tile tile = tile_at<S::tile_m * S::cluster, S::tile_n>(sizes, schedule.raster, index);
    const int row = tile.row + rank * S::tile_m, column = tile.column + rank * part;
    const int batch_a = tile.batch * sizes.batch_a, batch_b = tile.batch * sizes.batch_b;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, cursor.advance()) {
      uint64_t* const full = &shared.full[cursor.stage];
      ptx::mbarrier_wait(&shared.empty[cursor.stage], cursor.parity ^ 1);
      if (step == 0) shared.tile[cursor.stage] = {row, tile.column, tile.batch};
      ptx::mbarrier_arrive_expect_tx(full, S::stage_bytes);
      hopper::load_rows_hint<S::tile_m, a_mn_major>(shared.a[cursor.stage], map_a, full, schedule.a, step * tile_k, row,
                                                    batch_a);
      if constexpr (S::cluster == 1)
        hopper::load_rows_hint<S::tile_n, b_mn_major>(shared.b[cursor.stage], map_b, full, schedule.b, step * tile_k,
                                                      column, batch_b);
      else
        hopper::load_rows_multicast_hint<part, b_mn_major>(shared.b[cursor.stage] + rank * part * tile_k, map_b, full,
                                                           (1 << S::cluster) - 1, schedule.b, step * tile_k, column,
                                                           batch_b);
    }
  }
  ptx::griddepcontrol_launch_dependents();
  if constexpr (S::cluster > 1) hopper::drain<S::stages>(shared.empty, cursor);
}

template <class In, class S, bool a_mn_major, bool b_mn_major>
PTX_INLINE void consume(typename S::Shared& shared, const CUtensorMap* map_d, bool describable,
                        const hopper::Sizes& sizes, const EitherEpilogue<In>& epilogue, const Schedule& schedule,
                        int tiles, int consumer) {
  const int steps = divide_up(sizes.k, tile_k);
  const uint32_t thread = threadIdx.x % hopper::warpgroup;
  const int warp = ptx::uniform(thread / 32);
  const bool by_tma = describable && epilogue.plain();
  // Named barriers: 1.. the warpgroup's own, 1 + consumers.. the start of each that follows another.
  const int own = 1 + consumer, start = own + S::consumers;
  int until_next_starts = consumer + 1 < S::consumers ? min(schedule.stagger, steps) : 0;
  if (consumer > 0 && schedule.stagger > 0) ptx::named_barrier_sync(start - 1, 2 * hopper::warpgroup);

  hopper::Boxes<S::boxes>& boxes = shared.box[consumer * 4 + warp];
  hopper::Cursor<S::stages> cursor;
  const auto release = [&](int stage) {
    if constexpr (S::cluster == 1) {
      if (thread == 0) ptx::mbarrier_arrive(&shared.empty[stage]);
    } else {
      if (thread < S::cluster) ptx::mbarrier_arrive_remote(&shared.empty[stage], thread);
    }
  };
  for (int index = blockIdx.x / S::cluster; index < tiles; index += gridDim.x / S::cluster) {
    ptx::mbarrier_wait(&shared.full[cursor.stage], cursor.parity);
    const hopper::Tile tile = shared.tile[cursor.stage];
    ptx::named_barrier_sync(own, hopper::warpgroup);  // all have read it: one thread may release the stage
    float d[S::tile_n / 2];
    hopper::multiply_tile<S::tile_n, a_mn_major, b_mn_major>(d, shared, cursor, steps, consumer, release, [&] {
      if (until_next_starts > 0 && --until_next_starts == 0) ptx::named_barrier_arrive(start, 2 * hopper::warpgroup);
    });
    const int row = tile.row + consumer * 64 + warp * 16;
    if (by_tma) hopper::store_boxes<S::tile_n, In>(map_d, boxes, d, row, tile.column, tile.batch, schedule.d);
    else hopper::store_through_boxes<S::tile_n>(epilogue, boxes, d, row, tile.column, tile.batch);
  }
  if (by_tma && thread % 32 == 0) ptx::bulk_wait_group<0>();  // shared memory must outlive its last store
}

template <class In, class S, bool a_mn_major, bool b_mn_major>
__global__ void __launch_bounds__(S::threads, 1)
    best(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
         const __grid_constant__ CUtensorMap map_d, bool describable, hopper::Sizes sizes,
         EitherEpilogue<In> epilogue, Schedule schedule) {
  auto& shared = simt::dynamic_shared<typename S::Shared>();
  const int rank = S::cluster > 1 ? ptx::cluster_rank() : 0;
  const int tiles = hopper::count_tiles<S::tile_m * S::cluster, S::tile_n>(sizes);
  const int group = ptx::uniform(threadIdx.x / hopper::warpgroup);  // 0 is the producer
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&map_a);
    ptx::prefetch_tensor_map(&map_b);
    if (describable) ptx::prefetch_tensor_map(&map_d);
  }
  if (threadIdx.x == hopper::warpgroup) {
    for (int i = 0; i < S::stages; ++i) {
      ptx::mbarrier_init(&shared.full[i], 1);
      ptx::mbarrier_init(&shared.empty[i], S::consumers * S::cluster);
    }
    ptx::fence_mbarrier_init();
  }
  if constexpr (S::cluster > 1) hopper::cluster_meet();
  else __syncthreads();
  ptx::griddepcontrol_wait();

  if (group == 0) {
    if constexpr (S::consumers > 1) ptx::setmaxnreg_dec<S::producer_registers>();
    if (threadIdx.x == 0)
      produce<S, a_mn_major, b_mn_major>(shared, &map_a, &map_b, sizes, schedule, tiles, rank);
  } else {
    if constexpr (S::consumers > 1) ptx::setmaxnreg_inc<S::consumer_registers>();
    consume<In, S, a_mn_major, b_mn_major>(shared, &map_d, describable, sizes, epilogue, schedule, tiles, group - 1);
  }
}

// Step<...>::launch for hopper::dispatch.
template <int consumers, int tile_n, int cluster>
struct Family {
  template <class In, bool a_mn_major, bool b_mn_major>
  struct Step {
    static void launch(const Problem& p, Tiling tiling) {
      using S = Shape<In, consumers, tile_n, cluster>;
      const hopper::Operands operands = hopper::describe(p, S::tile_m, tile_n / cluster);
      const unsigned tiles = hopper::count_tiles(p, S::tile_m * cluster, tile_n);
      tiling.raster = std::min(tiling.raster, (p.m - 1) / (S::tile_m * cluster) + 1);  // no group is higher than d
      simt::launch(best<In, S, a_mn_major, b_mn_major>,
                   simt::Launch{dim3(hopper::persistent_blocks(tiles, cluster)), dim3(S::threads),
                                sizeof(typename S::Shared), cluster, false, p.stream, true},
                   operands.a, operands.b, hopper::output_map(p), hopper::output_describable(p),
                   hopper::Sizes::of(p, operands), EitherEpilogue<In>::of(p), Schedule::of(tiling));
    }
  };
};

// Each is instantiated in a file of its own, 16_best_<tile>.cu.
void tile_128x256(const Problem&, const Tiling&);
void tile_128x128(const Problem&, const Tiling&);
void tile_128x192(const Problem&, const Tiling&);
void tile_192x192(const Problem&, const Tiling&);
void tile_64(const Problem&, const Tiling&);
void split_128x128(const Problem&, const Tiling&);
void split_64x64(const Problem&, const Tiling&);

}  // namespace matmul::best
