// Finds the route on which the pieces of experts travel, as rounds of hops. Computes with integers only, so that every
// rank gets the same route.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace hecate {

// Bandwidths in bytes per second, in each direction. A resource carries one message at a time.
struct Links {
  std::int64_t device;      // one device, inside its node
  std::int64_t fabric;      // all devices of a node together, inside it
  std::int64_t crossing;    // one device, out of its node
  std::int64_t border;      // all devices of a node together, out of it
  std::int64_t message_ns;  // fixed cost of a message, for its sender and for its receiver
  std::int64_t relay_ns;    // from the arrival of a piece until it is on its way again
};

inline std::int64_t wire_ns(std::int64_t bytes, std::int64_t bandwidth) {
  return static_cast<std::int64_t>(static_cast<__int128>(bytes) * 1000000000 / bandwidth);
}

// The collective to find a route for. `holds` is bool [experts, devices]: the devices besides the owner that are to get
// the expert (gather), or that contribute to it (reduce).
struct Request {
  int experts, devices, devices_per_node;
  const bool* holds;
  const std::int64_t* owner;
  std::int64_t chunk_bytes;    // size of an expert
  std::int64_t partial_bytes;  // size of a partial sum of an expert; reductions only
  Links links;

  int node_of(int device) const { return device / devices_per_node; }
  int nodes() const { return devices / devices_per_node; }
  bool held(int expert, int device) const { return holds[static_cast<std::size_t>(expert) * devices + device]; }
  // The expert's holders in a node, other than `except`, in ascending order.
  std::vector<int> holders(int expert, int node, int except = -1) const;
};

constexpr int kAll = std::numeric_limits<int>::max();
constexpr int kBinomial = 0;

// How experts travel. Arity is that of the tree: 1 is a chain, kAll is one hop to every receiver, kBinomial lets each
// device send on for as long as the transfer lasts.
struct Travel {
  bool direct = true;    // whole chunks between owner and holder; the other fields are then not used
  int pieces = 1;        // number of pieces that an expert is cut into if it is relayed
  int inside = kAll;     // gather: arity within a node; reduce: 1 chain, kAll each piece is summed by a different device
  int across = kAll;     // arity over nodes; reduce: 1 chain, kAll every node sends to the owner
  bool spread = false;   // gather: pieces leave the owner's node through all holders there, not the owner alone
};

// One piece of one expert from `src` to `dst`.
struct Hop {
  int expert, piece, pieces, src, dst;
  int first = -1;         // reduce: lowest device whose contribution it contains
  bool partial = false;   // reduce: it is a sum of several contributions
  bool final = false;     // reduce: it is added to the owner's result, not to a sum that the owner sends on
  bool alone = false;     // reduce: it is the owner's result, to which nothing is added
  std::vector<int> after{};  // hops that must arrive before this one can be sent
  int behind = -1;        // reduce: hop that the receiver adds before this one
};

std::vector<Hop> gather_hops(const Request& request, const Travel& shape);
std::vector<Hop> reduce_hops(const Request& request, const Travel& shape);

// Result of the simulation, in nanoseconds: when each hop starts, if it starts as soon as its resources are free, and
// when all are done.
struct Timing {
  std::vector<std::int64_t> start;
  std::int64_t slot = 1;  // duration of the longest hop
  std::int64_t total = 0;
};

Timing simulate(const Request& request, const std::vector<Hop>& hops);

// Assigns each hop to a round. `order` is the order in which the simulation starts hops; it is kept within each round.
std::vector<int> gather_rounds(const Request& request, const std::vector<Hop>& hops, const Timing& timing,
                               const std::vector<int>& order);
std::vector<int> reduce_rounds(const Request& request, const std::vector<Hop>& hops, const Timing& timing,
                               const std::vector<int>& order);

struct Route {
  Travel shape;
  std::vector<Hop> hops;    // ordered by round
  std::vector<int> round;   // the round of each hop, ascending
  std::int64_t predicted_ns = 0;
  std::int64_t direct_ns = 0;
  std::int64_t bound_ns = 0;
};

// The route of the shape that `simulate` finds fastest; never slower than direct sends.
Route gather_route(const Request& request);
Route reduce_route(const Request& request);

// A lower bound for every route: the bytes that must enter or leave a device, or a node, divided by the bandwidth.
// It holds for gathers and reductions alike, since one is the reverse of the other.
std::int64_t bound_ns(const Request& request);

}  // namespace hecate
