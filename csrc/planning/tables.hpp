// How rows are sorted on their way to the experts' devices, as blocks of rows that keep their inner order.
#pragma once

#include <cstdint>
#include <vector>

namespace hecate {

// The (expert, device) pairs of a plan, ascending, and rows per source device and pair.
struct Traffic {
  const std::int64_t* holders;  // [pairs, 2]
  const std::int64_t* quota;    // [devices, pairs]
  int devices, pairs;
};

// A permutation of consecutive blocks of rows: in the new order, block i has rows[i] rows, each `shift[i]` behind the
// place that it had before. Empty blocks are left out.
struct Blocks {
  std::vector<std::int64_t> shift, rows;
};

struct Departures {
  Blocks blocks;                   // from rows by (expert, device) to rows by (device, expert)
  std::vector<std::int64_t> sent;  // rows to each device
  std::vector<std::int64_t> start;  // first row of each pair, sorted by (device, expert)
};

struct Arrivals {
  Blocks blocks;                       // from rows by (source, expert) to rows by (row of the expert here, source)
  bool sorted = true;                  // whether rows arrive in that order already
  std::vector<std::int64_t> received;  // rows from each device
  std::vector<std::int64_t> sizes;     // rows per expert held here, by the experts' rows
};

Departures departures(const Traffic& traffic, int rank);

// `local_rows` lists the experts held by `rank`, in the order of their rows.
Arrivals arrivals(const Traffic& traffic, int rank, const std::vector<int>& local_rows);

struct Locality {
  std::int64_t rows, within_nodes;  // all; those computed in the node of their source
};

Locality locality(const Traffic& traffic, int devices_per_node);

}  // namespace hecate
