// When delayed operations happen. Lazy: one at a time, when no thread can run (the latest issued first if the order is
// fifo, else any), and stores last of all, or when their thread waits. Random: now or then. Eager: at issue. Also what
// a block must have waited for before it ends.
#include <link.h>

#include <cstdio>

#include "state.h"

namespace simt::model {

namespace {

constexpr unsigned threads_of_a_warpgroup = 128;

enum class What { copy, arrival, wgmma };

struct Candidate {
  What what;
  size_t index;
  Cta* block = nullptr;
};

bool is_store(const CopyOperation& op) { return op.kind == CopyOperation::Kind::store; }

void collect(Gang& gang, bool with_stores, std::vector<Candidate>& candidates) {
  candidates.clear();
  for (size_t i = 0; i < gang.async.copies.size(); ++i)
    if (with_stores || !is_store(gang.async.copies[i])) candidates.push_back({What::copy, i});
  for (size_t i = 0; i < gang.async.arrivals.size(); ++i) candidates.push_back({What::arrival, i});
  for (auto& block : gang.blocks)
    for (size_t g = 0; g < block->async.warpgroups.size(); ++g)
      if (wgmma_ready(block->async.warpgroups[g])) candidates.push_back({What::wgmma, g, block.get()});
}

}  // namespace

std::string shared_name(uint32_t offset) {
  char text[24];
  snprintf(text, sizeof text, "smem+0x%x", offset);
  return text;
}

std::string swizzle_name(Swizzle mode) {
  return mode == Swizzle::none ? "no swizzle" : std::to_string(16 << int(mode)) + "-byte swizzle";
}

uint32_t shared_range(const std::string& what, const void* pointer, uint64_t bytes, uint32_t alignment, Site site) {
  const Cta& block = *self()->cta;
  if (!block.contains(pointer))
    fail(what + ": " + where(pointer) + " is not in the block's dynamic shared memory", site);
  const uint32_t offset = uint32_t(static_cast<const char*>(pointer) - block.shared);
  if (offset % alignment)
    fail(what + ": shared address " + shared_name(offset) + " is not " + std::to_string(alignment) + "-byte aligned",
         site);
  if (offset + bytes > block.shared_bytes)
    fail(what + ": " + std::to_string(bytes) + " bytes at " + shared_name(offset) + " run past the block's " +
             std::to_string(block.shared_bytes) + " bytes of shared memory",
         site);
  return offset;
}

// A static __shared__ lies in the thread-local storage of a loaded object.
bool is_shared(const void* pointer, size_t bytes) {
  const char* low = static_cast<const char*>(pointer);
  const Cta& block = *self()->cta;
  if (owner(pointer)) return block.contains(low) && block.contains(low + bytes - 1);
  static thread_local std::pair<const char*, const char*> last;  // of the object found last
  const auto inside = [&] { return low >= last.first && low + bytes <= last.second; };
  if (inside()) return true;
  struct Search {
    const char* low;
    std::pair<const char*, const char*> found;
  } search{low, {}};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto& search = *static_cast<Search*>(data);
        const auto* storage = static_cast<const char*>(info->dlpi_tls_data);
        for (int i = 0; storage && i < info->dlpi_phnum; ++i) {
          const char* end = storage + info->dlpi_phdr[i].p_memsz;
          if (info->dlpi_phdr[i].p_type == PT_TLS && search.low >= storage && search.low < end)
            search.found = {storage, end};
        }
        return 0;
      },
      &search);
  last = search.found;
  return inside();
}

bool happens_at_once() {
  const Async mode = worker->options.async;
  return mode == Async::eager || (mode == Async::random && worker->random() % 2);
}

void async_reset(Gang& gang) {
  gang.async = {};
  for (auto& block : gang.blocks) {
    block->async = {};
    block->async.warpgroups.resize((block->count + threads_of_a_warpgroup - 1) / threads_of_a_warpgroup);
  }
}

bool async_pending(const Gang& gang) {
  if (!gang.async.copies.empty() || !gang.async.arrivals.empty()) return true;
  for (const auto& block : gang.blocks)
    for (const Warpgroup& group : block->async.warpgroups)
      if (wgmma_ready(group)) return true;
  return false;
}

bool async_progress(Gang& gang) {
  static thread_local std::vector<Candidate> candidates;
  collect(gang, worker->options.async == Async::random, candidates);
  if (candidates.empty()) collect(gang, true, candidates);
  if (candidates.empty()) return false;
  const bool latest = worker->options.order == Order::fifo && worker->options.async != Async::random;
  const Candidate chosen = candidates[latest ? candidates.size() - 1 : worker->random() % candidates.size()];
  switch (chosen.what) {
    case What::copy: copy_complete(gang, chosen.index); break;
    case What::arrival: cp_arrival_complete(gang, chosen.index); break;
    case What::wgmma: {
      Warpgroup& group = chosen.block->async.warpgroups[chosen.index];
      wgmma_execute(*chosen.block, group, group.wanted);
    }
  }
  return true;
}

std::string async_leftover(const Cta& block) {
  for (const CopyOperation& op : block.gang->async.copies) {
    const std::string issued = " issued at " + at(op.site) + " by " + describe(*op.issuer);
    const std::string what = std::string("a ") + copy_name(op) + issued;
    if (is_store(op) && op.block == &block && !op.read)
      return what + " still reads the shared memory of " + block_name(block) + ", which has ended: its bulk group was not waited for";
    for (const Cta* target : op.targets)
      if (!is_store(op) && target == &block)
        return what + " was still in flight when " + block_name(block) + " ended: its mbarrier was not waited for";
  }
#if defined(SIMT_CHECKED)
  for (unsigned i = 0; i < block.count; ++i)
    for (const StoreDone& store : block.threads[i].async.stores_done)
      if (store.read.clock)
        return std::string("a ") + store.name + " issued at " + at(store.site) + " by " + describe(block.threads[i]) +
               " was not waited for before " + block_name(block) + " ended: it may still read shared memory";
#endif
  for (const CpArrival& arrival : block.gang->async.arrivals)
    if (arrival.thread->cta == &block)
      return "cp.async.mbarrier.arrive issued at " + at(arrival.site) + " by " + describe(*arrival.thread) +
             " had not arrived when " + block_name(block) + " ended: its mbarrier was not waited for";
  for (size_t g = 0; g < block.async.warpgroups.size(); ++g)
    for (const WgmmaOperation& op : block.async.warpgroups[g].operations)
      return "a wgmma issued at " + at(op.site) + " by warpgroup " + std::to_string(g) + " of " + block_name(block) +
             " was never waited for" + (op.waited ? " by some of its threads" : "");
  return "";
}

// What is left of a block that has ended are stores that have read shared memory: they need not be seen before the grid
// ends.
void async_exit(Cta& block) {
  Gang& gang = *block.gang;
  while (!gang.alive && !gang.async.copies.empty()) copy_complete(gang, 0);
}

// Where threads have written since TMA did, the layout is theirs.
void async_written_by_threads(Cta& block, uint32_t low, uint32_t high) {
  auto& layout = block.async.layout;
  for (size_t i = 0; i < layout.size();) {
    if (overlap(low, high, layout[i].offset, layout[i].offset + layout[i].bytes))
      layout.erase(layout.begin() + long(i));
    else
      ++i;
  }
}

}  // namespace simt::model
