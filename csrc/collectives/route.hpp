// How the pieces of experts travel: shapes in, frozen rounds of hops out. Integers only, so that every rank gets the same.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace hecate {

// Bytes per second; each is one direction. A resource carries one message after the other.
struct Links {
  std::int64_t device;      // one device, inside its node
  std::int64_t fabric;      // all devices of a node together, inside it
  std::int64_t crossing;    // one device, out of its node
  std::int64_t border;      // all devices of a node together, out of it
  std::int64_t message_ns;  // fixed cost of a message to who sends and who receives it
  std::int64_t relay_ns;    // from the arrival of a piece until it is on its way again
};

inline std::int64_t wire_ns(std::int64_t bytes, std::int64_t bandwidth) {
  return static_cast<std::int64_t>(static_cast<__int128>(bytes) * 1000000000 / bandwidth);
}

// What is to happen. `holds` is bool [experts, devices]: who holds an expert besides (gather), or contributes (reduce).
struct Request {
  int experts, devices, devices_per_node;
  const bool* holds;
  const std::int64_t* owner;
  std::int64_t chunk_bytes;    // of an expert
  std::int64_t partial_bytes;  // of a partial sum of one; reductions only
  Links links;

  int node_of(int device) const { return device / devices_per_node; }
  int nodes() const { return devices / devices_per_node; }
  bool held(int expert, int device) const { return holds[static_cast<std::size_t>(expert) * devices + device]; }
  // Holders of an expert in a node besides `except`, ascending.
  std::vector<int> holders(int expert, int node, int except = -1) const;
};

constexpr int kAll = std::numeric_limits<int>::max();
constexpr int kBinomial = 0;

// How experts travel. Arity is that of a tree: 1 a chain, kAll one hop to everybody, kBinomial as many hops from each
// device as it has time for.
struct Travel {
  bool direct = true;    // owner to holder or holder to owner, whole chunks; the rest does not count then
  int pieces = 1;        // of an expert that is handed on
  int inside = kAll;     // gather: arity in a node; reduce: 1 chain, kAll every piece summed by another device
  int across = kAll;     // arity over nodes; reduce: 1 chain, kAll every node to the owner
  bool spread = false;   // gather: pieces leave the owner's node through all its holders, not the owner alone
};

// One piece of one expert from `src` to `dst`.
struct Hop {
  int expert, piece, pieces, src, dst;
  int first = -1;         // reduce: lowest device whose contribution is in it
  bool partial = false;   // reduce: a sum of several
  bool final = false;     // reduce: part of the owner's result, not of a sum that the owner hands on
  bool alone = false;     // reduce: all of the owner's result
  std::vector<int> after{};  // hops that bring what this one carries
  int behind = -1;        // reduce: hop that the receiver adds before this one
};

std::vector<Hop> gather_hops(const Request& request, const Travel& shape);
std::vector<Hop> reduce_hops(const Request& request, const Travel& shape);

// When each hop starts if every resource serves whom it can first, and when all are done; nanoseconds.
struct Timing {
  std::vector<std::int64_t> start;
  std::int64_t slot = 1;  // the longest hop
  std::int64_t total = 0;
};

Timing simulate(const Request& request, const std::vector<Hop>& hops);

// The round of each hop. `order`: as the simulation starts them; hops of one round take place in that order.
std::vector<int> gather_rounds(const Request& request, const std::vector<Hop>& hops, const Timing& timing,
                               const std::vector<int>& order);
std::vector<int> reduce_rounds(const Request& request, const std::vector<Hop>& hops, const Timing& timing,
                               const std::vector<int>& order);

struct Route {
  Travel shape;
  std::vector<Hop> hops;    // by round
  std::vector<int> round;   // of each hop, ascending
  std::int64_t predicted_ns = 0;
  std::int64_t direct_ns = 0;
  std::int64_t bound_ns = 0;
};

// The fastest of the shapes by `simulate`; never slower than direct.
Route gather_route(const Request& request);
Route reduce_route(const Request& request);

// No schedule can be faster: bytes into or out of a device or across the border of a node, each over its bandwidth.
// The same for both: a reduction is the mirror image.
std::int64_t bound_ns(const Request& request);

}  // namespace hecate
