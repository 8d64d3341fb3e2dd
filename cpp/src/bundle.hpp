// A bundle folder: manifest.json, and every file it lists, verified. The rules are those of docs/bundle.md.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "cost.hpp"
#include "files.hpp"
#include "json.hpp"

namespace l2a::core {

inline constexpr const char* kManifest = "manifest.json";
inline constexpr const char* kWeights = "weights.bin";

enum class Kind { any, told, variant, fixed, router };  // `if`, `told`, `variant`, `static`, `router` in the manifest

struct GraphEntry {
    std::string name;
    std::string file;
    Kind kind = Kind::any;
    double budget = 1.0;  // of variants
    Widths widths;        // of variants: kept groups of each layer
};

struct Tags {
    std::int64_t think = 0;
    std::int64_t end_think = 0;
    std::int64_t answer = 0;
    std::int64_t end_answer = 0;
};

struct FileEntry {
    std::string sha256;
    std::uint64_t size = 0;
};

// What manifest.json says. Immutable after parse.
struct Manifest {
    Shape shape;
    CostModel cost;
    GateRules rules;
    bool tokens = false;  // whether the transition gate was trained
    Tags tags;
    std::int64_t positions = 1;
    bool whole_cache = true;
    std::string dialect;
    std::vector<GraphEntry> graphs;
    std::vector<std::size_t> variants;  // places in graphs, from the largest budget to the smallest
    std::map<std::string, FileEntry> files;

    // Throws a bundle error that names the field, what was found and what to do.
    static Manifest parse(std::string_view text);
};

// An open bundle: what was verified is what is used, since files are mapped once, hashed and kept.
class Bundle {
  public:
    // Throws a bundle error where the folder is not a whole bundle.
    static Bundle open(const std::string& folder);

    std::string folder;
    std::string text;  // of manifest.json
    Manifest manifest;
    std::shared_ptr<Mapping> weights;
    std::map<std::string, std::shared_ptr<Mapping>> graphs;  // by file
};

}  // namespace l2a::core
