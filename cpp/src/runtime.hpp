// An open bundle and its graphs over one copy of the weights. Immutable after the constructor: any thread.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "graph.hpp"
#include "onnx_reader.hpp"
#include "ort.hpp"

namespace l2a::core {

struct RuntimeOptions {
    int threads = 0;  // of one operator; 0: ONNX Runtime's choice
    Contract contract = Contract::cap;
    unsigned graphs = L2A_GRAPH_IF | L2A_GRAPH_VARIANTS | L2A_GRAPH_ROUTER;
};

class Runtime {
  public:
    Runtime(const std::string& folder, const RuntimeOptions& options);

    [[nodiscard]] const Bundle& bundle() const noexcept { return bundle_; }
    [[nodiscard]] const Manifest& manifest() const noexcept { return bundle_.manifest; }
    // In the manifest's order.
    [[nodiscard]] const std::vector<std::unique_ptr<Graph>>& graphs() const noexcept { return graphs_; }
    // The first open graph of a kind; nullptr where there is none.
    [[nodiscard]] const Graph* first(Kind kind) const noexcept;
    // Throws a budget error where the budget is out of range or below what the stem costs.
    [[nodiscard]] Told told(const Budget& budget) const;

  private:
    // Sessions end first, then what they share, then the environment.
    Ort ort_;
    RuntimeOptions options_;
    Bundle bundle_;
    Owner<OrtEnv> env_;
    Owner<OrtMemoryInfo> memory_;
    struct Weight {
        ExternalTensor place;
        Owner<OrtValue> value;  // over the mapped file
    };
    std::map<std::string, Weight> weights_;  // by name
    struct Constant {
        std::vector<std::byte> bytes;
        Owner<OrtValue> value;
    };
    std::map<std::string, Constant> constants_;  // by content: that graphs compute from constants
    Owner<OrtPrepackedWeightsContainer> prepacked_;
    std::vector<std::unique_ptr<Graph>> graphs_;

    [[nodiscard]] bool wanted(Kind kind) const noexcept;
    [[nodiscard]] Owner<OrtSessionOptions> session_options(const std::string& path) const;
    [[nodiscard]] std::unique_ptr<Graph> open(const GraphEntry& entry);
    // Gives the session all weights of a graph, each as a view of the mapped file.
    void share_weights(OrtSessionOptions* options, std::string_view graph, const std::string& path);
    // Gives it what it would compute from constants alone.
    void share_constants(OrtSessionOptions* options, std::string_view graph, const std::string& path);
    [[nodiscard]] OrtValue* constant(Owner<OrtValue> value);
    [[nodiscard]] OrtValue* weight(const ExternalTensor& place, const std::string& path);
};

}  // namespace l2a::core
