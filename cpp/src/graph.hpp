// One graph of a bundle in ONNX Runtime. Any number of threads may run it at once.
#pragma once

#include <string>
#include <vector>

#include "bundle.hpp"
#include "ort.hpp"

namespace l2a::core {

// One pair of past_key_values input and present output.
struct CacheInput {
    std::string past;
    std::string present;
    std::int64_t layer = 0;
    bool is_key = false;
    std::int64_t groups = 0;
    std::int64_t head_dim = 0;
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
};

// Inputs and outputs of a run; arrays are row-major. What a graph has not is ignored.
struct Run {
    std::int64_t batch = 1;
    std::int64_t sequence = 1;
    std::int64_t total = 1;
    const std::int64_t* input_ids = nullptr;   // [batch, sequence]
    const std::int64_t* mask = nullptr;        // [batch, total]
    const float* budget = nullptr;             // [batch, 2]
    const std::int64_t* limits = nullptr;      // [batch, 3]
    const float* price = nullptr;              // [batch]
    const std::int64_t* allocation = nullptr;  // [batch, layers]
    const OrtValues* caches = nullptr;         // as in Graph::caches, read and written in place
    float* logits = nullptr;                   // [batch, vocabulary]
    std::int64_t* kept_groups = nullptr;       // [batch, layers]
    float* tau = nullptr;                      // [batch]
    std::int64_t* variant = nullptr;           // [batch]
};

class Graph {
  public:
    // Takes over a session. `path` is for messages.
    Graph(const Ort& ort, Owner<OrtSession> session, GraphEntry entry, const Shape& shape, std::string path);

    [[nodiscard]] const GraphEntry& entry() const noexcept { return entry_; }
    [[nodiscard]] const std::string& path() const noexcept { return path_; }
    [[nodiscard]] const std::vector<CacheInput>& caches() const noexcept { return caches_; }
    // Whether some layer's cache has fewer groups than the model's.
    [[nodiscard]] bool is_narrow() const noexcept { return narrow_; }

    // A view of a cache buffer of this graph: [batch, groups, capacity, head_dim] over `data`.
    [[nodiscard]] Owner<OrtValue> view(const CacheInput& cache, void* data, std::int64_t batch,
                                       std::int64_t capacity) const;
    // Throws Error (config) where an array is missing, else (session, out of memory) what ONNX Runtime says.
    void run(const Run& run) const;

  private:
    Ort ort_;
    Owner<OrtSession> session_;
    Owner<OrtMemoryInfo> memory_;
    Owner<OrtRunOptions> giving_back_;
    GraphEntry entry_;
    std::string path_;
    std::int64_t layers_;
    std::int64_t vocabulary_;
    std::vector<CacheInput> caches_;
    std::vector<std::string> inputs_;  // besides the caches, in the order they are given
    std::vector<std::string> outputs_;
    bool narrow_ = false;

    class Values;
    [[nodiscard]] std::vector<std::string> names(bool inputs) const;
    [[nodiscard]] CacheInput cache_of(std::size_t place, const std::string& name, const Shape& sizes) const;
    void put(Values& values, const std::string& name, const Run& run) const;
};

}  // namespace l2a::core
