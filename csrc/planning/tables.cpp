#include "planning/tables.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace hecate {

namespace {

std::int64_t expert_of(const Traffic& traffic, int pair) { return traffic.holders[2 * pair]; }
std::int64_t device_of(const Traffic& traffic, int pair) { return traffic.holders[2 * pair + 1]; }

void append(Blocks& blocks, std::int64_t start, std::int64_t rows, std::int64_t& at) {
  if (rows == 0) return;
  blocks.shift.push_back(start - at);
  blocks.rows.push_back(rows);
  at += rows;
}

}  // namespace

Departures departures(const Traffic& traffic, int rank) {
  const std::int64_t* to_pair = traffic.quota + std::int64_t{rank} * traffic.pairs;
  // Counting sort of the pairs by device; it keeps the order of the experts.
  std::vector<int> first(traffic.devices + 1, 0), by_device(traffic.pairs);
  std::vector<std::int64_t> start(traffic.pairs);
  Departures out{{}, std::vector<std::int64_t>(traffic.devices, 0), std::vector<std::int64_t>(traffic.pairs)};
  std::int64_t at = 0;
  for (int p = 0; p < traffic.pairs; ++p) {
    ++first[device_of(traffic, p) + 1];
    out.sent[device_of(traffic, p)] += to_pair[p];
    start[p] = at;
    at += to_pair[p];
  }
  for (int d = 0; d < traffic.devices; ++d) first[d + 1] += first[d];
  for (int p = 0; p < traffic.pairs; ++p) by_device[first[device_of(traffic, p)]++] = p;
  at = 0;
  for (int p : by_device) {
    out.start[p] = at;
    append(out.blocks, start[p], to_pair[p], at);
  }
  return out;
}

Arrivals arrivals(const Traffic& traffic, int rank, const std::vector<int>& local_rows) {
  std::vector<int> here;  // pairs on this device, by expert
  for (int p = 0; p < traffic.pairs; ++p)
    if (device_of(traffic, p) == rank) here.push_back(p);
  const int held = static_cast<int>(here.size());
  Arrivals out;
  out.received.assign(traffic.devices, 0);
  out.sizes.assign(local_rows.size(), 0);
  std::vector<std::int64_t> start(static_cast<std::size_t>(traffic.devices) * held);
  std::int64_t at = 0;
  for (int s = 0; s < traffic.devices; ++s) {
    const std::int64_t* row = traffic.quota + std::int64_t{s} * traffic.pairs;
    const std::int64_t before = at;
    for (int i = 0; i < held; ++i) start[std::size_t(s) * held + i] = at, at += row[here[i]];
    out.received[s] = at - before;
  }
  at = 0;
  int used = 0;
  for (std::size_t r = 0; r < local_rows.size(); ++r) {
    const auto same = [&](int p) { return expert_of(traffic, p) == local_rows[r]; };
    const int i = static_cast<int>(std::find_if(here.begin(), here.end(), same) - here.begin());
    if (i == held) continue;  // the plan does not use this expert here
    ++used;
    const std::int64_t before = at;
    for (int s = 0; s < traffic.devices; ++s)
      append(out.blocks, start[std::size_t(s) * held + i], traffic.quota[std::int64_t{s} * traffic.pairs + here[i]], at);
    out.sizes[r] = at - before;
  }
  if (used < held)
    throw std::invalid_argument("the plan has " + std::to_string(held) + " experts on device " + std::to_string(rank) +
                                ", of which only " + std::to_string(used) + " are held there");
  out.sorted = std::all_of(out.blocks.shift.begin(), out.blocks.shift.end(), [](auto shift) { return shift == 0; });
  return out;
}

Locality locality(const Traffic& traffic, int devices_per_node) {
  const std::int64_t* const end = traffic.quota + std::int64_t{traffic.devices} * traffic.pairs;
  Locality out{std::accumulate(traffic.quota, end, std::int64_t{0}), 0};
  for (int p = 0; p < traffic.pairs; ++p) {
    const int first = static_cast<int>(device_of(traffic, p)) / devices_per_node * devices_per_node;
    for (int s = first; s < first + devices_per_node; ++s)
      out.within_nodes += traffic.quota[std::int64_t{s} * traffic.pairs + p];
  }
  return out;
}

}  // namespace hecate
