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
};

// The devices that hold an expert, in ascending order and grouped by node; with or without its owner.
class Groups {
 public:
  struct Group {
    int node;
    const int* devices;
    int size;
    // The i-th device if counting starts at device number `shift`.
    int at(int i, int shift) const { return devices[(i + shift) % size]; }
  };

  Groups(const Request& request, bool with_owner);

  int groups(int expert) const { return first_[expert + 1] - first_[expert]; }
  Group of(int expert, int i) const {
    const int g = first_[expert] + i;
    return {node_[g], device_.data() + begin_[g], begin_[g + 1] - begin_[g]};
  }
  // Number of holders other than the owner.
  int others(int expert) const { return others_[expert]; }

 private:
  std::vector<int> device_, node_, begin_, first_, others_;
};

constexpr int kMostDevices = 1 << 16;  // and experts

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
  int after = -1;         // hop that must arrive before this one can be sent, with those that it is behind
  int behind = -1;        // reduce: hop that the receiver adds before this one

  friend bool operator==(const Hop& a, const Hop& b) {
    return a.expert == b.expert && a.piece == b.piece && a.pieces == b.pieces && a.src == b.src && a.dst == b.dst &&
           a.first == b.first && a.partial == b.partial && a.final == b.final && a.alone == b.alone &&
           a.after == b.after && a.behind == b.behind;
  }
};

// Replaces `hops` by those of a shape; `after` and `behind` are lower than a hop's own number. `groups` are without
// owners for gathers, with owners for reductions.
void gather_hops(const Request& request, const Groups& groups, const Travel& shape, std::vector<Hop>& hops);
void reduce_hops(const Request& request, const Groups& groups, const Travel& shape, std::vector<Hop>& hops);

// Result of the simulation, in nanoseconds: when each hop starts, if it starts as soon as its resources are free, and
// when all are done.
struct Timing {
  std::vector<std::int64_t> start;
  std::int64_t slot = 1;  // duration of the longest hop
  std::int64_t total = 0;
};

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
