// Asynchronous copies: TMA tensors in one to five dimensions, bulk copies of plain bytes, Ampere's cp.async.
// Coordinates are in elements, innermost dimension first; what lies outside the tensor reads as zero and is not written.
#pragma once
#include "core.cuh"

namespace ptx {

// L2 eviction policies, as `createpolicy.fractional` encodes them.
enum class CacheHint : uint64_t {
  evict_normal = 0x1000000000000000ull,
  evict_first = 0x12f0000000000000ull,
  evict_last = 0x14f0000000000000ull,
};

PTX_INLINE void prefetch_tensor_map(const CUtensorMap* map) {
  PTX(asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"), (void)map);
}

#define PTX_COORDINATES_1 "{%3}"
#define PTX_COORDINATES_2 "{%3, %4}"
#define PTX_COORDINATES_3 "{%3, %4, %5}"
#define PTX_COORDINATES_4 "{%3, %4, %5, %6}"
#define PTX_COORDINATES_5 "{%3, %4, %5, %6, %7}"
#define PTX_OPERANDS_1 "r"(c0)
#define PTX_OPERANDS_2 "r"(c0), "r"(c1)
#define PTX_OPERANDS_3 "r"(c0), "r"(c1), "r"(c2)
#define PTX_OPERANDS_4 "r"(c0), "r"(c1), "r"(c2), "r"(c3)
#define PTX_OPERANDS_5 "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
#define PTX_NEXT_1 "4"
#define PTX_NEXT_2 "5"
#define PTX_NEXT_3 "6"
#define PTX_NEXT_4 "7"
#define PTX_NEXT_5 "8"
#define PTX_AFTER_1 "5"
#define PTX_AFTER_2 "6"
#define PTX_AFTER_3 "7"
#define PTX_AFTER_4 "8"
#define PTX_AFTER_5 "9"
#define PTX_PARAMETERS_1 int c0
#define PTX_PARAMETERS_2 int c0, int c1
#define PTX_PARAMETERS_3 int c0, int c1, int c2
#define PTX_PARAMETERS_4 int c0, int c1, int c2, int c3
#define PTX_PARAMETERS_5 int c0, int c1, int c2, int c3, int c4
#define PTX_LIST_1 c0
#define PTX_LIST_2 c0, c1
#define PTX_LIST_3 c0, c1, c2
#define PTX_LIST_4 c0, c1, c2, c3
#define PTX_LIST_5 c0, c1, c2, c3, c4

// For each rank:
//   tma_load              the box at the coordinates into `destination`; its bytes count on `barrier`
//   tma_load_hint         the same with an L2 eviction policy
//   tma_load_multicast    into the same offset of every block whose bit is set in `blocks`, signalling each one's barrier
//   tma_load_multicast_hint     both of these
//   tma_store, tma_reduce_add   from shared memory; waited for by bulk_commit_group and bulk_wait_group
//   tma_store_hint              with an L2 eviction policy
//   tma_prefetch          into L2 only
#define PTX_TMA(RANK)                                                                                                 \
  PTX_INLINE void tma_load(void* destination, const CUtensorMap* map, uint64_t* barrier,                              \
                           PTX_PARAMETERS_##RANK SIMT_SITE) {                                                         \
    PTX(asm volatile("cp.async.bulk.tensor." #RANK                                                                    \
                     "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, " PTX_COORDINATES_##RANK  \
                     "], [%2];" ::"r"(shared_address(destination)),                                                   \
                     "l"(map), "r"(shared_address(barrier)), PTX_OPERANDS_##RANK                                      \
                     : "memory"),                                                                                     \
        simt::model::tma_load(destination, map, barrier, {RANK, {PTX_LIST_##RANK}}, simt::model::no_multicast, site));      \
  }                                                                                                                   \
  PTX_INLINE void tma_load_hint(void* destination, const CUtensorMap* map, uint64_t* barrier, CacheHint hint,         \
                                PTX_PARAMETERS_##RANK SIMT_SITE) {                                                    \
    PTX(asm volatile("cp.async.bulk.tensor." #RANK                                                                    \
                     "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "               \
                     "[%1, " PTX_COORDINATES_##RANK "], [%" PTX_NEXT_##RANK "], %2;" ::"r"(shared_address(destination)),\
                     "l"(map), "l"(uint64_t(hint)), PTX_OPERANDS_##RANK, "r"(shared_address(barrier))                 \
                     : "memory"),                                                                                     \
        (void)hint;                                                                                                   \
        simt::model::tma_load(destination, map, barrier, {RANK, {PTX_LIST_##RANK}}, simt::model::no_multicast, site));      \
  }                                                                                                                   \
  PTX_INLINE void tma_load_multicast(void* destination, const CUtensorMap* map, uint64_t* barrier, uint16_t blocks,   \
                                     PTX_PARAMETERS_##RANK SIMT_SITE) {                                               \
    PTX(asm volatile("cp.async.bulk.tensor." #RANK                                                                    \
                     "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "           \
                     "[%1, " PTX_COORDINATES_##RANK "], [%2], %" PTX_NEXT_##RANK ";" ::"r"(                           \
                         shared_address(destination)),                                                                \
                     "l"(map), "r"(shared_address(barrier)), PTX_OPERANDS_##RANK, "h"(blocks)                         \
                     : "memory"),                                                                                     \
        simt::model::tma_load(destination, map, barrier, {RANK, {PTX_LIST_##RANK}}, blocks, site));                   \
  }                                                                                                                   \
  PTX_INLINE void tma_load_multicast_hint(void* destination, const CUtensorMap* map, uint64_t* barrier,               \
                                          uint16_t blocks, CacheHint hint, PTX_PARAMETERS_##RANK SIMT_SITE) {         \
    PTX(asm volatile("cp.async.bulk.tensor." #RANK                                                                    \
                     "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "  \
                     "[%0], [%1, " PTX_COORDINATES_##RANK "], [%" PTX_NEXT_##RANK "], %" PTX_AFTER_##RANK ", %2;" ::"r"( \
                         shared_address(destination)),                                                                \
                     "l"(map), "l"(uint64_t(hint)), PTX_OPERANDS_##RANK, "r"(shared_address(barrier)), "h"(blocks)    \
                     : "memory"),                                                                                     \
        (void)hint;                                                                                                   \
        simt::model::tma_load(destination, map, barrier, {RANK, {PTX_LIST_##RANK}}, blocks, site));                   \
  }                                                                                                                   \
  PTX_INLINE void tma_store_hint(const CUtensorMap* map, const void* source, CacheHint hint,                          \
                                 PTX_PARAMETERS_##RANK SIMT_SITE) {                                                   \
    PTX(asm volatile("cp.async.bulk.tensor." #RANK "d.global.shared::cta.tile.bulk_group.L2::cache_hint [%0, "        \
                     PTX_COORDINATES_##RANK "], [%1], %2;" ::"l"(map),                                                \
                     "r"(shared_address(source)), "l"(uint64_t(hint)), PTX_OPERANDS_##RANK                            \
                     : "memory"),                                                                                     \
        (void)hint;                                                                                                   \
        simt::model::tma_store(map, source, {RANK, {PTX_LIST_##RANK}}, simt::model::Reduction::none, site));          \
  }                                                                                                                   \
  PTX_INLINE void tma_store(const CUtensorMap* map, const void* source, PTX_PARAMETERS_##RANK SIMT_SITE) {            \
    PTX(asm volatile("cp.async.bulk.tensor." #RANK "d.global.shared::cta.tile.bulk_group [%0, " PTX_COORDINATES_##RANK \
                     "], [%1];" ::"l"(map),                                                                           \
                     "r"(shared_address(source)), "r"(0), PTX_OPERANDS_##RANK                                         \
                     : "memory"),                                                                                     \
        simt::model::tma_store(map, source, {RANK, {PTX_LIST_##RANK}}, simt::model::Reduction::none, site));          \
  }                                                                                                                   \
  PTX_INLINE void tma_reduce_add(const CUtensorMap* map, const void* source, PTX_PARAMETERS_##RANK SIMT_SITE) {       \
    PTX(asm volatile("cp.reduce.async.bulk.tensor." #RANK                                                             \
                     "d.global.shared::cta.add.tile.bulk_group [%0, " PTX_COORDINATES_##RANK "], [%1];" ::"l"(map),   \
                     "r"(shared_address(source)), "r"(0), PTX_OPERANDS_##RANK                                         \
                     : "memory"),                                                                                     \
        simt::model::tma_store(map, source, {RANK, {PTX_LIST_##RANK}}, simt::model::Reduction::add, site));           \
  }                                                                                                                   \
  PTX_INLINE void tma_prefetch(const CUtensorMap* map, PTX_PARAMETERS_##RANK SIMT_SITE) {                             \
    PTX(asm volatile("cp.async.bulk.prefetch.tensor." #RANK "d.L2.global.tile [%0, " PTX_COORDINATES_##RANK "];" ::"l"( \
                         map),                                                                                        \
                     "r"(0), "r"(0), PTX_OPERANDS_##RANK                                                              \
                     : "memory"),                                                                                     \
        simt::model::tma_prefetch(map, {RANK, {PTX_LIST_##RANK}}, site));                                             \
  }
PTX_TMA(1)
PTX_TMA(2)
PTX_TMA(3)
PTX_TMA(4)
PTX_TMA(5)
#undef PTX_TMA

// ---- bulk copies of contiguous bytes: addresses and sizes are multiples of 16 ----
PTX_INLINE void bulk_load(void* destination, const void* source, uint32_t bytes, uint64_t* barrier SIMT_SITE) {
  PTX(asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       shared_address(destination)),
                   "l"(source), "r"(bytes), "r"(shared_address(barrier))
                   : "memory"),
      simt::model::bulk_load(destination, source, bytes, barrier, site));
}
PTX_INLINE void bulk_store(void* destination, const void* source, uint32_t bytes SIMT_SITE) {
  PTX(asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination),
                   "r"(shared_address(source)), "r"(bytes)
                   : "memory"),
      simt::model::bulk_store(destination, source, bytes, simt::model::Reduction::none, simt::DataType::u8, site));
}
PTX_INLINE void bulk_reduce_add_f32(float* destination, const float* source, uint32_t bytes SIMT_SITE) {
  PTX(asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(destination),
                   "r"(shared_address(source)), "r"(bytes)
                   : "memory"),
      simt::model::bulk_store(destination, source, bytes, simt::model::Reduction::add, simt::DataType::f32, site));
}

// ---- bulk groups belong to the thread that issued the stores; other threads' waits return at once ----
PTX_INLINE void bulk_commit_group(SIMT_SITE_ONLY) {
  PTX(asm volatile("cp.async.bulk.commit_group;" ::: "memory"), simt::model::bulk_commit_group(site));
}
// At most `pending` of this thread's groups are unfinished: the others' data is in global memory.
template <int pending>
PTX_INLINE void bulk_wait_group(SIMT_SITE_ONLY) {
  PTX(asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory"),
      simt::model::bulk_wait_group(pending, false, site));
}
// At most `pending` groups still read shared memory: that of the others may be written again.
template <int pending>
PTX_INLINE void bulk_wait_group_read(SIMT_SITE_ONLY) {
  PTX(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory"),
      simt::model::bulk_wait_group(pending, true, site));
}

// ---- cp.async: each thread copies 4, 8 or 16 bytes; of these `source_bytes` are read and the rest are zeros ----
template <int bytes = 16>
PTX_INLINE void cp_async(void* destination, const void* source, int source_bytes = bytes SIMT_SITE) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (bytes == 16) {
    PTX(asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(destination)), "l"(source),
                     "r"(source_bytes)
                     : "memory"),
        simt::model::cp_async(destination, source, bytes, source_bytes, site));
  } else {
    PTX(asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(destination)), "l"(source),
                     "n"(bytes), "r"(source_bytes)
                     : "memory"),
        simt::model::cp_async(destination, source, bytes, source_bytes, site));
  }
}
PTX_INLINE void cp_async_commit_group(SIMT_SITE_ONLY) {
  PTX(asm volatile("cp.async.commit_group;" ::: "memory"), simt::model::cp_async_commit_group(site));
}
template <int pending>
PTX_INLINE void cp_async_wait_group(SIMT_SITE_ONLY) {
  PTX(asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"),
      simt::model::cp_async_wait_group(pending, site));
}
// The barrier gets this thread's arrival once its cp.async so far have landed; `count` at init must include it.
PTX_INLINE void cp_async_mbarrier_arrive_noinc(uint64_t* barrier SIMT_SITE) {
  PTX(asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory"),
      simt::model::cp_async_mbarrier_arrive(barrier, site));
}

}  // namespace ptx
