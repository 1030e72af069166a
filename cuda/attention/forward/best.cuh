// The kernel of the last forward steps, 08 and 09. What the step before still lost, and what is done about it:
//   - a block lived for one tile: nothing was multiplied while its first tiles came and while its output left. Here
//     blocks stay and take tile after tile: the producer is at the next tile's keys while consumers finish this one
//   - with a causal mask the last tiles of a sequence are the longest, and the longest ones started last leave
//     multiprocessors idle. Now they come first (best_schedule.cuh)
//   - outputs were stored by threads, 4 bytes each. Now they go through shared memory and TMA (best_output.cuh)
// As before: the producer keeps two stages of K and two of V full, consumers take turns at the tensor cores, and
// a consumer issues S of the next keys before P V of the last ones, so that its softmax runs beside a product.
// Key tiles go from the last to the first: a causal mask touches only the first ones taken, the others skip all rules.
//
// Refused with std::invalid_argument: other head widths than 64, 96, 128, 192, 256. Not yet measured on a GPU.
#pragma once
#include "attention/forward/best_output.cuh"
#include "attention/forward/best_schedule.cuh"
#include "attention/forward/best_softmax.cuh"

namespace attention::forward::best {

using hopper::warpgroup;

template <class Step, class T_, int head_dim_, int consumers_, int keys_>
struct Shape {
  using T = T_;
  using Softmax = typename Step::template Softmax<head_dim_>;
  static constexpr int head_dim = head_dim_, consumers = consumers_, keys = keys_;  // keys of a tile
  static constexpr int rows = 64 * consumers, threads = (consumers + 1) * warpgroup, stages = 2;
  static constexpr bool take_turns = head_dim <= 128;  // wider ones have little softmax beside their products
  // Registers a thread: 65536 are shared by all.
  static constexpr int producer_registers = consumers == 3 ? 32 : 24, consumer_registers = consumers == 3 ? 160 : 240;

  static constexpr int query_elements = hopper::tile_elements(64, head_dim);  // of one consumer
  static constexpr int key_elements = hopper::tile_elements(keys, head_dim);
  static constexpr int barriers = 2 * consumers + 4 * stages;
  // Whether there is room for outputs beside all else. If not they take the place of their queries.
  static constexpr bool room = 4 * consumers * query_elements + 4 * stages * key_elements + 8 * barriers <= 227 * 1024;
  static constexpr int first_output = room ? consumers : 0;

  struct Shared {
    alignas(1024) T q[room ? 2 * consumers : consumers][query_elements];  // outputs from first_output on
    alignas(1024) T k[stages][key_elements];
    alignas(1024) T v[stages][key_elements];
    uint64_t full_q[consumers], empty_q[consumers];
    uint64_t full_k[stages], empty_k[stages], full_v[stages], empty_v[stages];
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "shared memory of a block");
};

struct Maps {
  CUtensorMap q, k, v, o;
};

// One thread. K of a step comes before V of the step before: in this order consumers ask for them.
template <class S>
PTX_INLINE void produce(typename S::Shared& shared, const Maps& maps, const Schedule& schedule, const Rules& rules) {
  const bool packed = schedule.sizes.starts_q != nullptr;
  hopper::Cursor<S::stages> k, v;
  uint32_t parity_q = 1;
#pragma unroll 1
  for (int index = blockIdx.x; index < schedule.tiles; index += gridDim.x) {
    const Tile tile = schedule.tile<S::rows, S::keys>(rules, index);
    if (!tile.exists()) continue;
    const int kv_head = schedule.sizes.kv_head(tile.head), plane = packed ? 0 : tile.batch;
    const auto load_keys = [&](typename S::T* to, const CUtensorMap* map, uint64_t* full, int row) {
      ptx::mbarrier_arrive_expect_tx(full, hopper::tile_bytes(S::keys, S::head_dim));
      hopper::load_tile<S::keys, S::head_dim>(to, map, full, row, kv_head, plane);
    };
    int key = tile.s.first_key + tile.last * S::keys;
#pragma unroll 1
    for (int step = 0; step <= tile.steps; ++step, key -= S::keys) {
      if (step < tile.steps) {
        ptx::mbarrier_wait(&shared.empty_k[k.stage], k.parity ^ 1);
        load_keys(shared.k[k.stage], &maps.k, &shared.full_k[k.stage], key);
        k.advance();
      }
      if (step > 0) {
        ptx::mbarrier_wait(&shared.empty_v[v.stage], v.parity ^ 1);
        load_keys(shared.v[v.stage], &maps.v, &shared.full_v[v.stage], key + S::keys);
        v.advance();
        continue;
      }
#pragma unroll 1
      for (int c = 0; c < S::consumers; ++c) {
        ptx::mbarrier_wait(&shared.empty_q[c], parity_q);
        ptx::mbarrier_arrive_expect_tx(&shared.full_q[c], hopper::tile_bytes(64, S::head_dim));
        hopper::load_tile<64, S::head_dim>(shared.q[c], &maps.q, &shared.full_q[c],
                                           tile.s.first_query + tile.row + 64 * c, tile.head, plane,
                                           ptx::CacheHint::evict_first);
      }
      parity_q ^= 1;
    }
  }
  ptx::griddepcontrol_launch_dependents();
}

// What a consumer keeps from tile to tile.
template <class S>
struct Consumer {
  typename S::Shared& shared;
  const int number;
  uint32_t taken = 0;  // tiles of K so far; of V as many at the ends of a tile of queries, inside of it one fewer
  uint32_t parity_q = 0;

  // As a number that ptxas knows to be the same in all lanes: it computes descriptors beside the products then.
  PTX_INLINE void advance() { taken = ptx::uniform(taken + 1); }
  PTX_INLINE static int stage(uint32_t count) { return count % S::stages; }
  PTX_INLINE static uint32_t parity(uint32_t count) { return count / S::stages % 2; }

  // Named barriers: 1 + i is the turn of consumer i. The last one lets the first begin, and the first takes back the
  // last turn that was given.
  PTX_INLINE void open_turns() const {
    if (S::take_turns && number == S::consumers - 1) ptx::named_barrier_arrive(1, 2 * warpgroup);
  }
  PTX_INLINE void await_turn() const {
    if (S::take_turns) ptx::named_barrier_sync(1 + number, 2 * warpgroup);
  }
  PTX_INLINE void pass_turn() const {
    if (S::take_turns) ptx::named_barrier_arrive(number + 1 < S::consumers ? 2 + number : 1, 2 * warpgroup);
  }
  PTX_INLINE void close_turns() const {
    if (S::take_turns && number == 0) ptx::named_barrier_sync(1, 2 * warpgroup);
  }

  PTX_INLINE void release(uint64_t* empty) const {
    if (threadIdx.x % warpgroup == 0) ptx::mbarrier_arrive(empty);
  }
  PTX_INLINE void await_queries() {
    ptx::mbarrier_wait(&shared.full_q[number], parity_q);
    parity_q ^= 1;
  }
  PTX_INLINE void release_queries() const {  // each warp's: outputs in their place leave warp by warp
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.empty_q[number]);
  }

  // o = sum of exp(score - softmax.most) v over all keys of the tile, not divided yet.
  PTX_INLINE void attend(const Tile& tile, const Rules& rules, typename S::Softmax& softmax,
                         float (&o)[S::head_dim / 2]) {
    using T = typename S::T;
    const float scale_log2 = rules.scale * log2_e;
    const int row = tile.row + 64 * number, thread = threadIdx.x % warpgroup;
    const int query = row + 16 * (thread / 32) + thread % 32 / 4, column = 2 * (thread % 4);
    float scores[S::keys / 2], factor[2];
    uint32_t p[S::keys / 16][4];
    const auto issue_scores = [&] {
      hopper::multiply_along_head<S::keys, 64, S::keys, S::head_dim>(scores, shared.q[number], 0,
                                                                     shared.k[stage(taken)], 0);
      ptx::wgmma_commit_group();
    };
    const auto issue_output = [&] {
      hopper::multiply_along_rows<S::keys, S::keys, S::head_dim>(o, p, shared.v[stage(taken - 1)], 0);
      ptx::wgmma_commit_group();
    };
    const auto exponentials = [&](int step) {
      const int key = (tile.last - step) * S::keys;
      if (!rules.plain(tile.s, row, 64, key, S::keys))
        edit<S::keys>(scores, rules, tile.s, tile.batch, tile.head, query, key + column);
      return softmax.template add<S::keys>(scores, scale_log2, factor);
    };

    ptx::mbarrier_wait(&shared.full_k[stage(taken)], parity(taken));
    ptx::wgmma_fence();
    issue_scores();
    ptx::wgmma_wait_group<0>();
    release(&shared.empty_k[stage(taken)]);
    bool rescale = exponentials(0);
    advance();
    // The wait for P V opens the next turn of the loop. At the end of this one nothing would keep ptxas from moving it
    // up, before the exponentials that are to be computed meanwhile.
#pragma unroll 1
    for (int step = 1;; ++step) {
      ptx::wgmma_wait_group<0>();
      if (step > 1) release(&shared.empty_v[stage(taken - 2)]);
      if (rescale) multiply_rows<S::head_dim>(o, factor);
      to_operand<T, S::keys>(scores, p);
      if (step == tile.steps) break;
      ptx::mbarrier_wait(&shared.full_k[stage(taken)], parity(taken));
      await_turn();
      ptx::wgmma_fence();
      issue_scores();
      ptx::mbarrier_wait(&shared.full_v[stage(taken - 1)], parity(taken - 1));
      ptx::wgmma_fence();
      issue_output();
      pass_turn();
      ptx::wgmma_wait_group<1>();
      release(&shared.empty_k[stage(taken)]);
      rescale = exponentials(step);
      advance();
    }
    if (S::room) release_queries();  // before the last product: the next ones come during it
    ptx::mbarrier_wait(&shared.full_v[stage(taken - 1)], parity(taken - 1));
    ptx::wgmma_fence();
    issue_output();
    ptx::wgmma_wait_group<0>();
    release(&shared.empty_v[stage(taken - 1)]);
  }
};

struct Results {
  float* lse;
  int64_t lse_batch, lse_head;
};

template <class S>
PTX_INLINE void consume(typename S::Shared& shared, int number, const Maps& maps, const Schedule& schedule,
                        const Rules& rules, const Rows<typename S::T>& out, const Results& results) {
  const bool packed = schedule.sizes.starts_q != nullptr;
  const int thread = threadIdx.x % warpgroup, line = 64 * number + 16 * (thread / 32) + thread % 32 / 4;
  Consumer<S> consumer{shared, number};
  consumer.open_turns();
#pragma unroll 1
  for (int index = blockIdx.x; index < schedule.tiles; index += gridDim.x) {
    const Tile tile = schedule.tile<S::rows, S::keys>(rules, index);
    if (!tile.exists()) continue;
    typename S::Softmax softmax;
    float o[S::head_dim / 2], factor[2], lse[2];
#pragma unroll
    for (int i = 0; i < S::head_dim / 2; ++i) o[i] = 0.f;
    consumer.await_queries();
    if (tile.steps > 0) consumer.attend(tile, rules, softmax, o);
    softmax.finish(rules.scale * log2_e, rules.sink ? rules.sink[tile.head] : -INFINITY, factor, lse);
    multiply_rows<S::head_dim>(o, factor);
    typename S::T* const staged = shared.q[S::first_output + number];
    static_assert(S::room || !S::take_turns, "named barrier 1 + number is free");
    if (!S::room) ptx::named_barrier_sync(1 + number, warpgroup);  // for all four warps the products have read the queries
    store_output<S::head_dim>(staged, &maps.o, out, tile, tile.row + 64 * number, packed, o);
    float* const to = results.lse + tile.batch * results.lse_batch + tile.head * results.lse_head + tile.s.first_query;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (thread % 4 == 0 && tile.row + line + 8 * r < tile.s.queries) to[tile.row + line + 8 * r] = lse[r];
    if (!S::room || tile.steps == 0) {  // the next queries may come when the output has left their place
      if (thread % 32 == 0) ptx::bulk_wait_group_read<0>();
      consumer.release_queries();
    }
  }
  consumer.close_turns();
  if (thread % 32 == 0) ptx::bulk_wait_group<0>();  // shared memory must outlive its last store
}

template <class S>
__global__ void __launch_bounds__(S::threads, 1)
    attend(const __grid_constant__ Maps maps, const __grid_constant__ Schedule schedule,
           const __grid_constant__ Rules rules, const __grid_constant__ Rows<typename S::T> out,
           const __grid_constant__ Results results) {
  auto& shared = simt::dynamic_shared<typename S::Shared>();
  const int group = ptx::uniform(threadIdx.x / warpgroup);  // 0 is the producer
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v, &maps.o}) ptx::prefetch_tensor_map(map);
    for (int i = 0; i < S::consumers; ++i) {
      ptx::mbarrier_init(&shared.full_q[i], 1);
      ptx::mbarrier_init(&shared.empty_q[i], 4);  // warps
    }
    for (int i = 0; i < S::stages; ++i) {
      ptx::mbarrier_init(&shared.full_k[i], 1);
      ptx::mbarrier_init(&shared.full_v[i], 1);
      ptx::mbarrier_init(&shared.empty_k[i], S::consumers);
      ptx::mbarrier_init(&shared.empty_v[i], S::consumers);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::griddepcontrol_wait();
  if (group == 0) {
    ptx::setmaxnreg_dec<S::producer_registers>();
    if (threadIdx.x == 0) produce<S>(shared, maps, schedule, rules);
  } else {
    ptx::setmaxnreg_inc<S::consumer_registers>();
    consume<S>(shared, group - 1, maps, schedule, rules, out, results);
  }
}

template <class S>
void launch(const Problem& p) {
  const Schedule schedule = Schedule::of(p, S::rows);
  const Maps maps{hopper::query_map(p.q, p, 64), hopper::key_map(p.k, p, S::keys), hopper::key_map(p.v, p, S::keys),
                  hopper::query_map(p.o, p, 16)};
  const unsigned blocks = unsigned(std::min(schedule.tiles, simt::multiprocessors()));
  const simt::Launch shape{dim3(blocks), dim3(S::threads), sizeof(typename S::Shared), 1, false, p.stream, true};
  simt::launch(attend<S>, shape, maps, schedule, Rules::of(p), Rows<typename S::T>::of(p.o),
               Results{p.lse, p.lse_batch, p.lse_head});
}

// What the two steps choose, see best_softmax.cuh. In 09 only head width 64 computes exponentials as polynomials: wider
// ones have products that take longer than their exponentials.
struct Persistent08 {
  template <int head_dim>
  using Softmax = RunningSoftmax<-1, 0>;
};
struct Best09 {
  template <int head_dim>
  using Softmax = RunningSoftmax<0, head_dim == 64 ? 8 : 0>;
};

// The tile shapes, for each head width: what registers and shared memory hold. Width 128 could have up to 176 keys,
// where the output takes the place of its queries; which is best has not been measured.
template <class Step, int head_dim>
void launch_width(const Problem& p) {
  constexpr int consumers = head_dim == 64 ? 3 : 2, keys = head_dim <= 128 ? 128 : head_dim == 192 ? 112 : 80;
  for_type(p, [&](auto zero) { launch<Shape<Step, decltype(zero), head_dim, consumers, keys>>(p); });
}

// Each is instantiated in a file of its step: they compile side by side.
void persistent_64(const Problem&), persistent_96(const Problem&), persistent_128(const Problem&);
void persistent_192(const Problem&), persistent_256(const Problem&);
void best_64(const Problem&), best_96(const Problem&), best_128(const Problem&), best_192(const Problem&);
void best_256(const Problem&);

inline void refuse_width(const Problem& p) {
  refuse("head width " + std::to_string(p.head_dim) + ": expected 64, 96, 128, 192 or 256");
}

}  // namespace attention::forward::best
