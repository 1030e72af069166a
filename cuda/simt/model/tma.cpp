// TMA and bulk copies: what is checked when they are issued, and what happens to shared memory when they land.
// A load's destination is poisoned until it lands. A store reads the async view of shared memory: what threads wrote
// without a fence.proxy.async does not reach it. Not modelled: loads into another block's memory except by multicast.
#include <algorithm>
#include <cstring>

#include "state.h"
#include "trace.h"

namespace simt::model {

namespace {

constexpr long groups_kept = 64;         // of a thread, that it has waited for the reading of
constexpr uint64_t stores_kept_back = 8;  // of a thread, between reading shared memory and writing global memory

void check_map(const char* what, const TensorMap* map, const Coordinates& at, Site site) {
  if (reinterpret_cast<uintptr_t>(map) % 64) fail(std::string(what) + ": the tensor map is not 64-byte aligned", site);
  if (at.rank != map->shape.rank)
    fail(std::string(what) + " with " + std::to_string(at.rank) + " coordinates on a tensor map of rank " +
             std::to_string(map->shape.rank),
         site);
}

void check_bulk(const char* what, const void* global, uint32_t bytes, Site site) {
  if (bytes % 16) fail(std::string(what) + " of " + std::to_string(bytes) + " bytes, expected a multiple of 16", site);
  if (reinterpret_cast<uintptr_t>(global) % 16)
    fail(std::string(what) + ": the global address " + where(global) + " is not 16-byte aligned", site);
}

void check_reduction(Reduction reduction, DataType type, Site site) {
  if (reduction != Reduction::none && (type == DataType::u8 || type == DataType::u16))
    fail("cp.reduce.async.bulk has no such reduction for this element type", site);
}

CopyOperation operation(CopyOperation::Kind kind, Site site) {
  CopyOperation op{};
  op.kind = kind;
  op.block = self()->cta;
  op.issuer = self();
  op.site = site;
  return op;
}

CopyOperation tensor_operation(CopyOperation::Kind kind, const TensorMap* map, Coordinates at, const void* shared,
                               Site site) {
  CopyOperation op = operation(kind, site);
  op.tensor = true;
  check_map(copy_name(op), map, at, site);
  op.map = *map;
  op.at = at;
  op.type = map->type;
  op.bytes = box_bytes(*map);
  op.offset = shared_range(copy_name(op), shared, op.bytes, 128, site);
  return op;
}

CopyOperation bulk_operation(CopyOperation::Kind kind, const void* global, const void* shared, uint32_t bytes,
                             Site site) {
  CopyOperation op = operation(kind, site);
  check_bulk(copy_name(op), global, bytes, site);
  op.global = static_cast<char*>(const_cast<void*>(global));
  op.type = DataType::u8;
  op.bytes = bytes;
  op.offset = shared_range(copy_name(op), shared, bytes, 16, site);
  return op;
}

// ---- between the box in order and shared memory with its swizzle --------------------------------------------------

template <class Move>
void each_piece(const CopyOperation& op, Move move) {  // move(offset in shared memory, offset in the box, bytes)
  const Swizzle mode = op.tensor ? op.map.swizzle : Swizzle::none;
  if (mode == Swizzle::none) return move(op.offset, 0u, op.bytes);
  for (uint32_t i = 0; i < op.bytes; i += 16)
    move(swizzled(shared_window + op.offset + i, mode) - shared_window, i, 16u);
}

void remember_layout(const CopyOperation& op, Cta& block) {
  auto& layout = block.async.layout;
  layout.erase(std::remove_if(layout.begin(), layout.end(),
                              [&](const WrittenByTma& w) {
                                return overlap(w.offset, w.offset + w.bytes, op.offset, op.offset + op.bytes);
                              }),
               layout.end());
  if (op.tensor) layout.push_back({op.offset, op.bytes, op.map.swizzle, op.site});
}

// ---- issue --------------------------------------------------------------------------------------------------------

void issue(CopyOperation op) {
  check::count(check::Count::tma_operations, 1, op.site);
  check::count(check::Count::tma_bytes, op.bytes, op.site);
  check::issue(op.snapshot, *self(), check::Agent::tma);
  if (op.kind == CopyOperation::Kind::store) check::issue(op.written, *self(), check::Agent::tma_write);
  Gang& gang = *op.block->gang;
  gang.async.copies.push_back(std::move(op));
  if (happens_at_once()) copy_complete(gang, gang.async.copies.size() - 1);
}

void choose_targets(CopyOperation& op, uint32_t multicast_mask) {
  if (multicast_mask == no_multicast) return op.targets.push_back(op.block);
  if (!multicast_mask) fail(std::string(copy_name(op)) + ": the multicast mask is 0, it names no block", op.site);
  const auto& blocks = op.block->cluster->blocks;
  for (uint32_t rank = 0; rank < 32; ++rank) {
    if (!(multicast_mask >> rank & 1)) continue;
    if (rank >= blocks.size())
      fail(std::string(copy_name(op)) + ": the multicast mask names block rank " + std::to_string(rank) +
               " of a cluster of " + std::to_string(blocks.size()),
           op.site);
    if (!blocks[rank]->alive)
      fail(std::string(copy_name(op)) + ": multicast into " + block_name(*blocks[rank]) + ", which has exited",
           op.site);
    if (blocks[rank] != op.block && !op.block->cluster->phase)
      fail(std::string(copy_name(op)) + ": multicast into " + block_name(*blocks[rank]) + ", which " + not_started_text,
           op.site);
    op.targets.push_back(blocks[rank]);
  }
}

void load(CopyOperation op, uint64_t* barrier, uint32_t multicast_mask) {
  op.barrier_offset = shared_range(std::string("the mbarrier of a ") + copy_name(op), barrier, 8, 8, op.site);
  if (overlap(op.barrier_offset, op.barrier_offset + 8, op.offset, op.offset + op.bytes))
    fail(std::string(copy_name(op)) + " of " + std::to_string(op.bytes) + " bytes to " + shared_name(op.offset) +
             " overwrites its own mbarrier at " + shared_name(op.barrier_offset),
         op.site);
  choose_targets(op, multicast_mask);
  trace("load", int64_t(op.barrier_offset), int64_t(op.bytes), op.site);
  for (Cta* target : op.targets) {
    mbarrier_check(reinterpret_cast<uint64_t*>(target->shared + op.barrier_offset), op.site);
    check_overwrite(copy_name(op), *target, op.offset, op.bytes, op.site);
  }
  for (Cta* target : op.targets) {
    remember_layout(op, *target);
    memset(target->shared + op.offset, 0xff, op.bytes);
    memset(target->shared_async + op.offset, 0xff, op.bytes);
  }
  issue(std::move(op));
}

void store(CopyOperation op) {
  check_reduction(op.reduction, op.type, op.site);
  if (const CopyOperation* other = load_in_flight(*op.block, op.offset, op.offset + op.bytes))
    fail(std::string(copy_name(op)) + " reads " + shared_name(op.offset) + " while " + copy_in_words(*other) +
             " is still in flight there (its mbarrier was not waited for)",
         op.site);
  op.number = self()->async.bulk_issued++;
  trace("store", 0, int64_t(op.bytes), op.site);
  issue(std::move(op));
}

// ---- what happens -------------------------------------------------------------------------------------------------

void land(CopyOperation& op) {
  static thread_local std::vector<char> box;
  box.resize(op.bytes);
  read_global(op, box.data());
  for (Cta* target : op.targets) {
    if (!target->alive)
      fail_issued(std::string(copy_name(op)) + " lands in the memory of " + block_name(*target) + ", which has exited",
                  op.site, *op.block);
    each_piece(op, [&](uint32_t offset, uint32_t in_box, uint32_t bytes) {
      memcpy(target->shared + offset, box.data() + in_box, bytes);
      memcpy(target->shared_async + offset, box.data() + in_box, bytes);
    });
    check::async_access(op.snapshot, target->shared + op.offset, op.bytes, true, target, op.site);
    auto* barrier = reinterpret_cast<uint64_t*>(target->shared + op.barrier_offset);
    mbarrier_complete_transaction(barrier, op.bytes, op.snapshot, op.site);
  }
}

// Of a box that hangs over the tensor's edge, only what lies inside has to be there.
void check_read([[maybe_unused]] CopyOperation& op) {
#if defined(SIMT_CHECKED)
  const Swizzle mode = op.tensor ? op.map.swizzle : Swizzle::none;
  const uint32_t span = 16u << int(mode);  // what a swizzle permutes; a row of the box, if there is one
  const auto access = [&](uint32_t offset, uint32_t bytes) {
    check::async_access(op.snapshot, op.block->shared + offset, bytes, false, op.block, op.site);
  };
  for (auto [low, high] : inside_tensor(op)) {
    if (mode == Swizzle::none) {
      access(op.offset + low, high - low);
      continue;
    }
    while (low < high) {
      const uint32_t spans = low % span ? 0 : (high - low) / span * span;
      const uint32_t bytes = spans ? spans : std::min(high, low / 16 * 16 + 16) - low;
      access(spans ? op.offset + low : swizzled(shared_window + op.offset + low, mode) - shared_window, bytes);
      low += bytes;
    }
  }
#endif
}

void read_shared(CopyOperation& op) {
  op.read = true;
  op.data.resize(op.bytes);
  check_read(op);
  each_piece(op, [&](uint32_t offset, uint32_t in_box, uint32_t bytes) {
    memcpy(op.data.data() + in_box, op.block->shared_async + offset, bytes);
  });
}

}  // namespace

void copy_complete(Gang& gang, size_t index) {
  CopyOperation op = std::move(gang.async.copies[index]);
  gang.async.copies.erase(gang.async.copies.begin() + long(index));
  if (op.kind == CopyOperation::Kind::load) return land(op);
  if (!op.read) read_shared(op);
  write_global(op, op.data.data());
#if defined(SIMT_CHECKED)
  op.issuer->async.stores_done.push_back({op.number, copy_name(op), op.site, op.snapshot, op.written});
#endif
  progressed();
}

// ---- what kernels call --------------------------------------------------------------------------------------------

void tma_load(void* destination, const TensorMap* map, uint64_t* barrier, Coordinates at, uint32_t multicast_mask,
              Site site) {
  Inside inside;
  load(tensor_operation(CopyOperation::Kind::load, map, at, destination, site), barrier, multicast_mask);
}

void tma_store(const TensorMap* map, const void* source, Coordinates at, Reduction reduction, Site site) {
  Inside inside;
  CopyOperation op = tensor_operation(CopyOperation::Kind::store, map, at, source, site);
  op.reduction = reduction;
  store(std::move(op));
}

void tma_prefetch(const TensorMap* map, Coordinates at, Site site) {
  Inside inside;
  check_map("TMA prefetch", map, at, site);
}

void bulk_load(void* destination, const void* source, uint32_t bytes, uint64_t* barrier, Site site) {
  Inside inside;
  load(bulk_operation(CopyOperation::Kind::load, source, destination, bytes, site), barrier, no_multicast);
}

void bulk_store(void* destination, const void* source, uint32_t bytes, Reduction reduction, DataType type,
                Site site) {
  Inside inside;
  CopyOperation op = bulk_operation(CopyOperation::Kind::store, destination, source, bytes, site);
  op.reduction = reduction;
  op.type = type;
  store(std::move(op));
}

// ---- bulk groups: of the thread that issued the stores ------------------------------------------------------------

void bulk_commit_group(Site site) {
  Inside inside;
  trace("store commit", 0, 0, site);
  ThreadAsync& mine = self()->async;
  mine.bulk_groups.push_back(mine.bulk_issued);
}

// Waits for reading alone leave the groups open for a wait that never comes: the oldest become one. Of stores before
// that, what is written later by the same lane of TMA stands for the others.
static void forget_old_stores([[maybe_unused]] ThreadAsync& its) {
#if defined(SIMT_CHECKED)
  auto& done = its.stores_done;
  const auto stands_for = [&](const StoreDone& old) {
    if (old.read.clock || old.number >= its.bulk_groups.front()) return false;
    return std::any_of(done.begin(), done.end(), [&](const StoreDone& store) {
      return store.number < its.bulk_groups.front() && store.written.agent == old.written.agent &&
             store.written.tick > old.written.tick;
    });
  };
  std::vector<StoreDone> kept;
  for (const StoreDone& store : done)
    if (!stands_for(store)) kept.push_back(store);
  done = std::move(kept);
#endif
}

void bulk_wait_group(int pending, bool read_only, Site site) {
  Inside inside;
  trace("store wait", 0, pending, site);
  Thread& thread = *self();
  auto& groups = thread.async.bulk_groups;
  if (int(groups.size()) <= pending) return;
  const uint64_t end = groups[groups.size() - 1 - size_t(pending)];
  Gang& gang = *thread.cta->gang;
  for (size_t i = 0; i < gang.async.copies.size();) {
    CopyOperation& op = gang.async.copies[i];
    if (op.kind == CopyOperation::Kind::load || op.issuer != &thread || op.number >= end) {
      ++i;
      continue;
    }
    if (!op.read) read_shared(op);
    check::acquire(op.snapshot, thread);
    op.snapshot = {};  // the thread knows
    if (read_only && op.number + stores_kept_back > thread.async.bulk_issued) {
      ++i;
      continue;
    }
    copy_complete(gang, i);
  }
  auto& done = thread.async.stores_done;
  for (StoreDone& store : done) {
    if (store.number >= end) continue;
    check::acquire(store.read, thread);
    store.read = {};
    if (!read_only) check::acquire(store.written, thread);
  }
  if (!read_only) {
    const auto known = [end](const StoreDone& store) { return store.number < end; };
    done.erase(std::remove_if(done.begin(), done.end(), known), done.end());
    groups.erase(groups.begin(), groups.end() - pending);
  } else if (long(groups.size()) > groups_kept) {
    groups.erase(groups.begin(), groups.end() - groups_kept);
    forget_old_stores(thread.async);
  }
}

}  // namespace simt::model
