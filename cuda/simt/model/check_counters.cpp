// Counters by source line. A warp's request is put together from its lanes' accesses: the n-th one that each lane makes
// at a place. Fibers run one lane after the other, so requests stay open until the last lane comes or the block ends.
#include "../cpu/counters.h"

#if defined(SIMT_CHECKED)
#include "check_counters.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <unordered_map>

#include "check_places.h"

namespace simt {

namespace model::check {

namespace {

struct Sum {
  uint64_t requests = 0, bytes = 0, actual = 0, ideal = 0;
};

struct Request {
  unsigned lanes = 0, bytes = 0;
  uint16_t place;
  const char* kind;
  bool banks;
  uintptr_t address[32];
};

struct WarpRequests {
  std::unordered_map<uint64_t, Request> open;      // by place and number
  std::vector<std::vector<uint32_t>> made;         // by lane and place: accesses so far
  unsigned lanes = ~0u;
};

std::map<std::pair<uint16_t, const char*>, Sum> sums;
std::vector<WarpRequests> warps;
unsigned warps_of_block = 1;

// 32-byte sectors of a request, and the fewest that hold as many bytes.
void count_sectors(const Request& request, Sum& sum) {
  std::vector<uintptr_t> sectors, bytes;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(request.lanes >> lane & 1)) continue;
    bytes.push_back(request.address[lane]);
    for (uintptr_t s = request.address[lane] / 32; s <= (request.address[lane] + request.bytes - 1) / 32; ++s)
      sectors.push_back(s);
  }
  const auto distinct = [](std::vector<uintptr_t>& values) {
    std::sort(values.begin(), values.end());
    return size_t(std::unique(values.begin(), values.end()) - values.begin());
  };
  sum.actual += distinct(sectors);
  sum.ideal += (distinct(bytes) * request.bytes + 31) / 32;
}

// Passes over the banks: 32 of 4 bytes. Lanes that want the same word share it. Accesses of 8 bytes go in half warps,
// of 16 in quarters.
void count_banks(const Request& request, Sum& sum) {
  const int group = request.bytes <= 4 ? 32 : request.bytes <= 8 ? 16 : 8;
  for (int first = 0; first < 32; first += group) {
    std::vector<uintptr_t> words;
    for (int lane = first; lane < first + group; ++lane)
      if (request.lanes >> lane & 1)
        for (uintptr_t w = request.address[lane] / 4; w <= (request.address[lane] + request.bytes - 1) / 4; ++w)
          words.push_back(w);
    if (words.empty()) continue;
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    unsigned in_bank[32] = {}, most = 0;
    for (uintptr_t word : words) most = std::max(most, ++in_bank[word % 32]);
    sum.actual += most;
    sum.ideal += (words.size() + 31) / 32;
  }
}

void finish(const Request& request) {
  Sum& sum = sums[{request.place, request.kind}];
  ++sum.requests;
  sum.bytes += uint64_t(__builtin_popcount(request.lanes)) * request.bytes;
  request.banks ? count_banks(request, sum) : count_sectors(request, sum);
}

const char* kind_of(Space space, bool own_block, bool write) {
  if (space == Space::global) return write ? "global write" : "global read";
  if (space == Space::static_shared || own_block) return write ? "shared write" : "shared read";
  return write ? "remote write" : "remote read";
}

const char* kind_of(Count what) {
  switch (what) {
    case Count::tma_bytes: case Count::tma_operations: return "tma";
    case Count::wgmma: return "wgmma";
    case Count::mma: return "mma";
    case Count::barrier_waits: return "barrier";
    case Count::mbarrier_waits: return "mbarrier";
    case Count::atomics: return "atomic";
    default: return "cp.async";
  }
}

void add_lane(WarpRequests& warp, unsigned lane, uint16_t place, const char* kind, bool banks, uintptr_t address,
              unsigned bytes) {
  auto& made = warp.made[lane];
  if (made.size() <= place) made.resize(place + 1u);
  const uint64_t key = uint64_t(place) << 32 | made[place]++;
  Request& request = warp.open[key];
  if (!request.lanes) {
    request.place = place;
    request.kind = kind;
    request.banks = banks;
  }
  request.bytes = std::max(request.bytes, bytes);
  request.lanes |= 1u << lane;
  request.address[lane] = address;
  if (request.lanes != warp.lanes) return;
  finish(request);
  warp.open.erase(key);
}

}  // namespace

void begin_counting(const Gang& gang) {
  warps_of_block = unsigned(gang.blocks[0]->warps.size());
  warps.assign(gang.blocks.size() * warps_of_block, {});
  for (size_t i = 0; i < warps.size(); ++i) {
    warps[i].made.resize(32);
    const unsigned left = gang.blocks[0]->count - unsigned(i % warps_of_block) * 32;
    if (left < 32) warps[i].lanes = (1u << left) - 1;
  }
}

void count_access(const Thread& thread, uint16_t place, Space space, bool own_block, const void* pointer, size_t bytes,
                  bool write) {
  if (space != Space::global && space != Space::shared && space != Space::static_shared) return;
  WarpRequests& warp = warps[thread.index / thread.cta->count * warps_of_block + thread.linear / 32];
  const char* kind = kind_of(space, own_block, write);
  for (size_t done = 0; done < bytes; done += 16)  // a struct goes in pieces of 16 bytes
    add_lane(warp, thread.linear % 32, place, kind, space != Space::global, reinterpret_cast<uintptr_t>(pointer) + done,
             unsigned(std::min<size_t>(16, bytes - done)));
}

void count(Count what, uint64_t number, Site site) {
  if (!worker->options.counters) return;
  Sum& sum = sums[{place_of(site), kind_of(what)}];
  const bool bytes = what == Count::tma_bytes || what == Count::cp_async_bytes;
  if (bytes) sum.bytes += number;
  if (what != Count::tma_operations) {
    sum.actual += number;
    sum.ideal += number;
  }
  if (what != Count::tma_bytes) sum.requests += bytes ? 1 : number;
}

void flush_counters() {
  for (WarpRequests& warp : warps) {
    for (const auto& entry : warp.open) finish(entry.second);
    warp.open.clear();
  }
}

}  // namespace model::check

std::vector<CounterRow> take_counters() {
  using namespace model::check;
  std::lock_guard lock(model::locks().grid);
  std::vector<uint16_t> places;
  for (const auto& [key, sum] : sums) places.push_back(key.first);
  read_lines(places);
  std::map<std::tuple<std::string, int, std::string>, Sum> by_line;  // several instructions may share a line
  for (const auto& [key, sum] : sums) {
    const Site site = read_line(key.first);
    Sum& total = by_line[{site.file, site.line, key.second}];
    total.requests += sum.requests;
    total.bytes += sum.bytes;
    total.actual += sum.actual;
    total.ideal += sum.ideal;
  }
  sums.clear();
  std::vector<CounterRow> rows;
  for (const auto& [key, sum] : by_line)
    rows.push_back({std::get<0>(key), std::get<1>(key), std::get<2>(key), sum.requests, sum.bytes, sum.actual,
                    sum.ideal});
  return rows;
}

}  // namespace simt
#else
std::vector<simt::CounterRow> simt::take_counters() { return {}; }
#endif
