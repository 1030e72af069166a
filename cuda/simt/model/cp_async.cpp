// cp.async: each thread's small copies from global to shared memory, delayed until the thread waits for their group (or
// until an mbarrier must have its arrival). The destination is poisoned until then. They write as the thread would: TMA
// and wgmma see the data after a fence.proxy.async. cp.async.mbarrier.arrive
// is that with .noinc.
#include <cstring>

#include "state.h"

namespace simt::model {

namespace {

void check_copy(const char* destination, const char* source, int bytes, int source_bytes, Site site) {
  const std::string what = "cp.async of " + std::to_string(bytes) + " bytes";
  if (bytes != 4 && bytes != 8 && bytes != 16) fail(what + ", expected 4, 8 or 16", site);
  if (source_bytes < 0 || source_bytes > bytes)
    fail(what + " from " + std::to_string(source_bytes) + " bytes, expected 0 to " + std::to_string(bytes), site);
  if (!is_shared(destination, size_t(bytes)))
    fail(what + ": the destination " + where(destination) + " is not shared memory", site);
  if (reinterpret_cast<uintptr_t>(destination) % uintptr_t(bytes))
    fail(what + ": the destination " + where(destination) + " is not aligned to that", site);
  if (reinterpret_cast<uintptr_t>(source) % uintptr_t(bytes))
    fail(what + ": the source " + where(source) + " is not aligned to that", site);
}

void land_copy(CpAsync& copy, Cta& block) {
  if (copy.landed) return;
  copy.landed = true;
  Cta* shared = block.contains(copy.destination) ? &block : nullptr;
  if (copy.source_bytes)
    check::async_access(copy.snapshot, copy.source, size_t(copy.source_bytes), false, nullptr, copy.site);
  check::async_access(copy.snapshot, copy.destination, size_t(copy.bytes), true, shared, copy.site);
  memset(copy.destination, 0, size_t(copy.bytes));
  memcpy(copy.destination, copy.source, size_t(copy.source_bytes));
}

uint64_t issued(const ThreadAsync& mine) { return mine.copies_done + mine.copies.size(); }

void land_until(Thread& thread, uint64_t end) {
  ThreadAsync& its = thread.async;
  for (uint64_t i = its.copies_done; i < end; ++i) land_copy(its.copies[i - its.copies_done], *thread.cta);
}

}  // namespace

void cp_async(void* destination, const void* source, int bytes, int source_bytes, Site site) {
  Inside inside;
  Thread& thread = *self();
  Cta& block = *thread.cta;
  CpAsync copy{static_cast<char*>(destination), static_cast<const char*>(source), bytes, source_bytes, false, site, {}};
  check_copy(copy.destination, copy.source, bytes, source_bytes, site);
  if (block.contains(destination)) {
    const uint32_t offset = uint32_t(copy.destination - block.shared);
    check_overwrite("cp.async", block, offset, uint32_t(bytes), site);
    memset(block.shared_async + offset, 0xff, size_t(bytes));
  }
  memset(destination, 0xff, size_t(bytes));
  check::count(check::Count::cp_async_bytes, uint64_t(bytes), site);
  check::issue(copy.snapshot, thread, check::Agent::cp_async);
  if (happens_at_once()) land_copy(copy, block);
  thread.async.copies.push_back(std::move(copy));
}

void cp_async_commit_group(Site) {
  Inside inside;
  ThreadAsync& mine = self()->async;
  mine.copy_groups.push_back(issued(mine));
}

void cp_async_wait_group(int pending, Site) {
  Inside inside;
  Thread& thread = *self();
  ThreadAsync& mine = thread.async;
  if (int(mine.copy_groups.size()) <= pending) return;
  const uint64_t end = mine.copy_groups[mine.copy_groups.size() - 1 - size_t(pending)];
  mine.copy_groups.erase(mine.copy_groups.begin(), mine.copy_groups.end() - pending);
  check::acquire(mine.retired, thread);
  if (end <= mine.copies_done) return;
  land_until(thread, end);
  for (uint64_t i = mine.copies_done; i < end; ++i) check::acquire(mine.copies[i - mine.copies_done].snapshot, thread);
  mine.copies.erase(mine.copies.begin(), mine.copies.begin() + long(end - mine.copies_done));
  mine.copies_done = end;
}

void cp_async_mbarrier_arrive(uint64_t* barrier, Site site) {
  Inside inside;
  Thread& thread = *self();
  shared_range("the mbarrier of cp.async.mbarrier.arrive", barrier, 8, 8, site);
  mbarrier_check(barrier, site);
  CpArrival arrival{&thread, issued(thread.async), barrier, site, {}};
  check::issue(arrival.snapshot, thread, check::Agent::cp_async);
  auto& arrivals = thread.cta->gang->async.arrivals;
  arrivals.push_back(std::move(arrival));
  if (happens_at_once()) cp_arrival_complete(*thread.cta->gang, arrivals.size() - 1);
}

void cp_arrival_complete(Gang& gang, size_t index) {
  const CpArrival arrival = std::move(gang.async.arrivals[index]);
  gang.async.arrivals.erase(gang.async.arrivals.begin() + long(index));
  land_until(*arrival.thread, arrival.end);
  mbarrier_arrive_by(arrival.barrier, arrival.snapshot, arrival.site);  // later than all of these copies: brings them along
  ThreadAsync& its = arrival.thread->async;
  while (its.copy_groups.empty() && its.copies_done < arrival.end) {  // no wait for a group asks for them one by one
    its.retired = its.copies.front().snapshot;
    its.copies.pop_front();
    ++its.copies_done;
  }
}

}  // namespace simt::model
