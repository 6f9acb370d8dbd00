// What kernels do, counted (profile.py). The n-th time that the lanes of a warp are at a place of the code is
// one access of the warp.
#include "machine.h"

#include <algorithm>
#include <map>
#include <set>
#include <sstream>
#include <utility>
#include <vector>

using namespace ptx;

namespace {

struct Note {
  u32 site;
  char space;
  u64 address;
  u32 bytes;
};

struct Site {
  u64 accesses = 0, lanes = 0, cost = 0, least = 0;
};

// Lanes of a warp that have ended.
struct Ended {
  size_t count = 0;
  std::vector<std::vector<Note>> lanes{32};
};

struct Profile {
  u64 counts[k_kinds] = {}, launches = 0, blocks = 0, threads = 0;
  const char* const* places = nullptr;
  std::map<std::pair<u32, char>, Site> sites;
  std::map<std::pair<u64, u32>, Ended> warps;  // of a block
};

thread_local bool on = false;
// By name and code: Triton compiles a function several times.
thread_local std::map<std::pair<std::string, const void*>, Profile> profiles;
thread_local Profile nothing;
thread_local Profile* profile = &nothing;  // of the kernel that runs
thread_local std::map<const emulate::Fiber*, std::vector<Note>> notes;

// Rounds of the 32 banks of shared memory that lanes' words take. Lanes are served together whose accesses
// have 128 bytes.
u64 rounds(const std::vector<Note>& lanes, u64& least) {
  const size_t together = 128 / std::max(4u, lanes[0].bytes);
  u64 cost = 0;
  for (size_t first = 0; first < lanes.size(); first += together) {
    std::map<u64, std::set<u64>> banks;
    std::set<u64> words;
    for (size_t i = first; i < std::min(first + together, lanes.size()); ++i)
      for (u64 word = lanes[i].address / 4; word * 4 < lanes[i].address + lanes[i].bytes; ++word) {
        banks[word % 32].insert(word);
        words.insert(word);
      }
    u64 most = 0;
    for (const auto& [bank, used] : banks) most = std::max<u64>(most, used.size());
    cost += most;
    least += (words.size() + 31) / 32;
  }
  return cost;
}

// Sectors of 32 bytes of global memory.
u64 sectors(const std::vector<Note>& lanes, u64& least) {
  std::set<u64> touched, words;
  for (const Note& note : lanes)
    for (u64 word = note.address / 4; word * 4 < note.address + note.bytes; ++word) {
      words.insert(word);
      touched.insert(word / 8);
    }
  least += (words.size() + 7) / 8;
  return touched.size();
}

void warp_ended(const std::vector<std::vector<Note>>& lanes) {
  std::map<std::pair<u32, char>, std::vector<std::vector<Note>>> accesses;
  for (const auto& lane : lanes) {
    std::map<std::pair<u32, char>, size_t> turns;
    for (const Note& note : lane) {
      auto& all = accesses[{note.site, note.space}];
      const size_t turn = turns[{note.site, note.space}]++;
      if (turn == all.size()) all.emplace_back();
      all[turn].push_back(note);
    }
  }
  for (const auto& [key, all] : accesses) {
    Site& site = profile->sites[key];
    for (const auto& together : all) {
      ++site.accesses;
      site.lanes += together.size();
      site.cost += key.second == 's' ? rounds(together, site.least) : sectors(together, site.least);
    }
  }
}

}  // namespace

bool ptx::profiling() {
  return on;
}

u64* ptx::launch_begins(const Code& code, u64 blocks) {
  if (!on) return nothing.counts;
  profile = &profiles[{code.name, code.places}];
  profile->places = code.places;
  ++profile->launches;
  profile->blocks += blocks;
  return profile->counts;
}

void ptx::thread_ends(const Thread& thread) {
  ++profile->threads;
  const u64 block =
      (u64(thread.ctaid.z) * thread.nctaid.y + thread.ctaid.y) * thread.nctaid.x + thread.ctaid.x;
  const auto key = std::make_pair(block, thread.tid.x / 32);
  Ended& warp = profile->warps[key];
  std::swap(warp.lanes[thread.tid.x % 32], notes[&Machine::here().current()]);
  if (++warp.count < 32) return;
  warp_ended(warp.lanes);
  profile->warps.erase(key);
}

EXPORTED void ptx_note(u32 site, char space, u64 address, u32 bytes) {
  notes[&Machine::here().current()].push_back({site, space, address, bytes});
}

// From now on or no longer; either way nothing has been counted.
EXPORTED void ptx_profile(int yes) {
  profiles.clear();
  notes.clear();
  profile = &nothing;
  on = yes != 0;
}

// Lines of what was counted, by tabs: kernel, launches, blocks, threads, instructions by kind; and behind it
// its places, which begin with an empty field: instruction and line, space, accesses of warps, lanes in them,
// rounds or sectors, and the least that would do.
EXPORTED const char* ptx_profile_report() {
  static thread_local std::string text;
  std::ostringstream out;
  for (const auto& [key, one] : profiles) {
    out << key.first << '\t' << one.launches << '\t' << one.blocks << '\t' << one.threads;
    for (const u64 count : one.counts) out << '\t' << count;
    out << '\n';
    for (const auto& [place, site] : one.sites)
      out << '\t' << one.places[place.first] << '\t' << place.second << '\t' << site.accesses << '\t'
          << site.lanes << '\t' << site.cost << '\t' << site.least << '\n';
  }
  text = out.str();
  return text.c_str();
}
