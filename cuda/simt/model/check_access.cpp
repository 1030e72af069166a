// One access: is it inside something, may the thread make it, and is it ordered? For threads, atomics and asynchronous
// operations; and the registers that belong to a wgmma in flight.
#if defined(SIMT_CHECKED)
#include "check_access.h"

#include "check_counters.h"
#include "check_places.h"

namespace simt::model::check {

namespace {

struct Registers {
  const char *start, *end;
  bool written;
  Site site;
};
std::vector<std::vector<Registers>> flying;  // by thread of the gang

struct Touched {  // bytes of its own stack that a thread has touched since its last wgmma.fence; the latest of them
  bool watching = false;
  unsigned count = 0, next = 0;
  struct {
    const char *start, *end;
    uint16_t place;
  } piece[32];

  void add(const char* start, const char* end, uint16_t place) {
    for (unsigned i = 0; i < count; ++i)
      if (start <= piece[i].end && end >= piece[i].start) {  // neighbours become one
        piece[i] = {std::min(start, piece[i].start), std::max(end, piece[i].end), place};
        return;
      }
    if (count < 32) piece[count++] = {start, end, place};
    else piece[next++ % 32] = {start, end, place};
  }
};
std::vector<Touched> touched;  // by thread of the gang

std::string bytes_text(size_t bytes) { return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes"); }

[[noreturn]] void out_of_bounds(const Access& access) {
  report(access, std::string("out-of-bounds ") + (access.write ? "write" : "read") + " of " + bytes_text(access.bytes) +
                     nearest(access.pointer));
}

void check_located(const Access& access, const Location& location) {
  switch (location.space) {
    case Space::shared: return check_shared(access, *location.block, location.offset);
    case Space::global: return check_global(access);
    case Space::static_shared:
      if (worker->gang.blocks.size() > 1)
        report(access, "a static __shared__ variable in blocks that run together (a cluster, or co_resident), which "
                       "would share it here: use simt::dynamic_shared");
      return check_static_shared(access, location.offset);
    case Space::constant:
      if (access.write) report(access, "write to " + name_of(access.pointer) + ", which kernels may only read");
      return;
    case Space::other_stack:
      report(access, std::string(access.write ? "write to" : "read of") + " a local variable of another thread");
    case Space::other_cluster:
      report(access, std::string(access.write ? "write to " : "read of ") + name_of(access.pointer) +
                         ", which is not in this cluster");
    case Space::nowhere: out_of_bounds(access);
  }
}

// A peer may not have started yet, or has exited and given its shared memory back.
void check_reachable(const Access& access, const Location& location, const Thread& thread) {
  if (location.space != Space::shared || location.block == thread.cta) return;
  const std::string what = std::string(access.write ? "write to " : "read of ") + name_of(access.pointer);
  if (!location.block->alive) report(access, what + ", whose block has exited");
  if (!thread.cta->cluster->phase) report(access, what + ", whose block " + not_started_text);
}

Access by(Thread& thread, const void* pointer, size_t bytes, bool write, uint16_t place) {
  Access access{static_cast<const char*>(pointer), bytes, write};
  const Clock& clock = clock_of(thread);
  access.who = thread.index;
  access.tick = clock.tick;
  access.place = place;
  access.clock = &clock;
  return access;
}

}  // namespace

void check_generic(const void* pointer, size_t bytes, bool write, bool is_volatile, Thread& thread, uint16_t place) {
  Access access = by(thread, pointer, bytes, write, place);
  access.is_volatile = is_volatile;
  const Location location = locate(pointer, bytes, write, thread);
  check_reachable(access, location, thread);
  if (is_volatile && location.space != Space::constant) {
    if (!write) volatile_access(pointer, location.space != Space::global, false, thread);
    access.tick = clock_of(thread).tick;
  }
  check_located(access, location);
  if (is_volatile && write) volatile_access(pointer, location.space != Space::global, true, thread);
  if (worker->options.counters)
    count_access(thread, place, location.space, location.block == thread.cta, pointer, bytes, write);
}

void touch(const void* pointer, size_t bytes, bool write, Thread& thread, Site site) {
  check_generic(pointer, bytes, write, false, thread, place_of(site));
}

void atomic(const void* pointer, size_t bytes, Thread& thread, Site site) {
  const uint16_t place = place_of(site);
  const Location location = locate(pointer, bytes, true, thread);
  check_reachable(by(thread, pointer, bytes, true, place), location, thread);
  synchronise(pointer, location.space != Space::global, thread);
  Access access = by(thread, pointer, bytes, true, place);
  access.atomic = true;
  --access.tick;  // what it released holds the atomic itself
  check_located(access, location);
}

void load_acquire(const void* pointer, size_t bytes, Thread& thread, Site site) {
  check_generic(pointer, bytes, false, true, thread, place_of(site));
}

void store_release(const void* pointer, size_t bytes, Thread& thread, Site site) {
  const Location location = locate(pointer, bytes, true, thread);
  Access access = by(thread, pointer, bytes, true, place_of(site));
  access.is_volatile = true;
  check_reachable(access, location, thread);
  check_located(access, location);
  release_at(pointer, location.space != Space::global, thread);
}

void async_access(Snapshot& snapshot, const void* pointer, size_t bytes, bool write, Cta* shared, Site issued,
                  bool atomic) {
  if (!bytes) return;
  Access access{static_cast<const char*>(pointer), bytes, write};
  access.who = snapshot.agent;
  access.tick = snapshot.tick;
  access.place = place_of(issued);
  access.clock = snapshot.clock.get();
  access.atomic = atomic;
  access.async = clocks.kind(snapshot.agent) != Agent::cp_async;
  if (atomic) clocks.reductions[{clocks.gang, snapshot.agent, snapshot.tick}] = snapshot.clock;
  const Thread& issuer = worker->gang.threads[snapshot.clock->issuer];
  if (!shared) return check_located(access, locate(pointer, bytes, write, issuer));
  const char* const async_view = shared->shared_async;
  const bool in_view = access.pointer >= async_view && access.pointer < async_view + shared->shared_bytes;
  const size_t offset = size_t(access.pointer - (in_view ? async_view : shared->shared));
  access.pointer = shared->shared + offset;
  if (offset + bytes > shared->shared_bytes) out_of_bounds(access);
  check_shared(access, *shared, offset);
}

// ---- registers ----
void in_flight(Thread& thread, const void* registers, size_t bytes, bool written, Site issued) {
  const char* start = static_cast<const char*>(registers);
  for (Registers& r : flying[thread.index])
    if (r.start == start && r.end == start + bytes && r.written == written) {
      r.site = issued;
      return;
    }
  flying[thread.index].push_back({start, start + bytes, written, issued});
}

void landed(Thread& thread) { flying[thread.index].clear(); }

bool any_watched(const Thread& thread) { return touched[thread.index].watching || !flying[thread.index].empty(); }

void fence_registers(Thread& thread) {
  Touched& its = touched[thread.index];
  its.watching = true;
  its.count = 0;
}

void touch_registers(Thread& thread, const void* registers, size_t bytes, Site site) {
  if (any_watched(thread)) check_registers(registers, bytes, true, thread, place_of(site));
}

void registers_fenced(Thread& thread, const void* registers, size_t bytes, Site site) {
  const char* start = static_cast<const char*>(registers);
  const Touched& its = touched[thread.index];
  for (unsigned i = 0; i < its.count; ++i)
    if (start < its.piece[i].end && start + bytes > its.piece[i].start)
      fail("wgmma without a wgmma.fence since its registers were touched at " + line_text(its.piece[i].place), site);
}

void check_registers(const void* pointer, size_t bytes, bool write, const Thread& thread, uint16_t place) {
  const char* start = static_cast<const char*>(pointer);
  touched[thread.index].add(start, start + bytes, place);
  for (const Registers& r : flying[thread.index])
    if (start < r.end && start + bytes > r.start && (write || r.written))
      fail("registers of the wgmma issued at " + line_text(place_of(r.site)) + " are touched before wgmma_wait_group",
           read_line(place));
}

// ---- grids and gangs ----
void begin_grid(const void* kernel, const void* argument) {
  begin_module(kernel, argument);
  begin_global_shadow();
  forget_addresses();
}

void begin_gang(Gang& gang) {
  const unsigned count = unsigned(gang.threads.size());
  ++clocks.gang;
  clocks.threads = count;
  clocks.blocks = unsigned(gang.blocks.size());
  clocks.block_threads = gang.blocks[0]->count;
  clocks.warpgroups_of_block = (clocks.block_threads + 127) / 128;
  clocks.thread.assign(count, {});
  for (unsigned i = 0; i < count; ++i) {
    clocks.thread[i].clock.self = i;
    clocks.thread[i].clock.tick = 1;
  }
  clocks.agent_tick.assign(lanes + clocks.blocks * clocks.warpgroups_of_block, 0);
  clocks.time = 0;
  clocks.mbarriers.clear();
  clocks.shared_addresses.clear();
  for (auto& registers : flying) registers.clear();
  if (flying.size() < count) flying.resize(count);
  touched.assign(count, {});
  begin_shadow();
  if (worker->options.counters) begin_counting(gang);
}

void end_gang(Gang&) {
  if (worker->options.counters) flush_counters();
}

}  // namespace simt::model::check
#endif
