#include "runtime.hpp"

#include <onnxruntime_session_options_config_keys.h>

#include <set>

#include "pages.hpp"

namespace l2a::core {
namespace {

constexpr std::size_t kLeastShared = 1U << 16;  // bytes of a constant that is worth it

// One arena for what graphs compute in between, of all sessions of the process: only some of them run at a time, and an
// arena keeps what it once had. Where the process has registered one, that one is used.
void share_arena(const Ort& ort, OrtEnv* env) {
    const Owner<OrtMemoryInfo> memory = arena_memory(ort);
    const Owner<OrtStatus> registered(ort->CreateAndRegisterAllocator(env, memory.get(), nullptr), ort->ReleaseStatus);
}

}  // namespace

Runtime::Runtime(const std::string& folder, const RuntimeOptions& options)
    : options_(options), bundle_(Bundle::open(folder)) {
    if (manifest().dialect != "ort") {
        bundle_error(folder + ": has no graphs of the dialect ort to run; export with --dialect ort");
    }
    const HugePages pages;
    OrtEnv* env = nullptr;
    ort_.check(ort_->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "l2a", &env), "onnxruntime cannot be started");
    env_ = {env, ort_->ReleaseEnv};
    share_arena(ort_, env);
    OrtMemoryInfo* memory = nullptr;
    ort_.check(ort_->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory), "memory");
    memory_ = {memory, ort_->ReleaseMemoryInfo};
    OrtPrepackedWeightsContainer* container = nullptr;
    ort_.check(ort_->CreatePrepackedWeightsContainer(&container), "a container of prepacked weights");
    prepacked_ = {container, ort_->ReleasePrepackedWeightsContainer};
    for (const GraphEntry& entry : manifest().graphs) {  // one after another: making two at once was said to be racy
        if (wanted(entry.kind)) graphs_.push_back(open(entry));
    }
    if (graphs_.empty()) bundle_error(folder + ": has none of the graphs that were asked for; export them");
    bundle_.weights->release_pages();  // what was prepacked is not read again
    pages.ask();
}

bool Runtime::wanted(Kind kind) const noexcept {
    return (kind == Kind::any && (options_.graphs & L2A_GRAPH_IF) != 0) ||
           (kind == Kind::variant && (options_.graphs & L2A_GRAPH_VARIANTS) != 0) ||
           (kind == Kind::router && (options_.graphs & L2A_GRAPH_ROUTER) != 0);
}

Owner<OrtSessionOptions> Runtime::session_options(const std::string& path) const {
    OrtSessionOptions* made = nullptr;
    ort_.check(ort_->CreateSessionOptions(&made), path);
    Owner<OrtSessionOptions> options(made, ort_->ReleaseSessionOptions);
    ort_.check(ort_->SetSessionLogSeverityLevel(made, ORT_LOGGING_LEVEL_ERROR), path);
    // Else threads of one session go on spinning for a while behind a run, and the session that runs next waits.
    ort_.check(ort_->AddSessionConfigEntry(made, kOrtSessionOptionsConfigForceSpinningStop, "1"), path);
    // Graphs are loaded from verified bytes; ONNX Runtime still looks whether the file that they name is there.
    ort_.check(ort_->AddSessionConfigEntry(made, kOrtSessionOptionsModelExternalInitializersFileFolderPath,
                                           bundle_.folder.c_str()),
               path);
    return options;
}

std::unique_ptr<Graph> Runtime::open(const GraphEntry& entry) {
    const std::string path = bundle_.folder + "/" + entry.file;
    const Mapping& graph = *bundle_.graphs.at(entry.file);
    const Owner<OrtSessionOptions> options = session_options(path);
    OrtSessionOptions* made = options.get();
    ort_.check(ort_->AddSessionConfigEntry(made, kOrtSessionOptionsConfigUseEnvAllocators, "1"), path);
    // Else a session remembers a plan for each shape of its inputs, and each step of a request has a new one.
    ort_.check(ort_->DisableMemPattern(made), path);
    if (options_.threads > 0) {
        ort_.check(ort_->SetIntraOpNumThreads(made, options_.threads), path);
        ort_.check(ort_->SetInterOpNumThreads(made, 1), path);
    }
    share_weights(made, graph.text(), path);
    share_constants(made, graph.text(), path);
    OrtSession* session = nullptr;
    ort_.check(ort_->CreateSessionFromArrayWithPrepackedWeightsContainer(env_.get(), graph.data(), graph.size(), made,
                                                                         prepacked_.get(), &session),
               path + ": onnxruntime cannot load it");
    return std::make_unique<Graph>(ort_, Owner<OrtSession>(session, ort_->ReleaseSession), entry, manifest().shape,
                                   path);
}

void Runtime::share_weights(OrtSessionOptions* options, std::string_view graph, const std::string& path) {
    std::set<std::string> seen;
    for (const ExternalTensor& place : external_tensors(graph)) {
        OrtValue* value = weight(place, path);
        if (!seen.insert(place.name).second) continue;  // in two branches
        ort_.check(ort_->AddInitializer(options, place.name.c_str(), value), path);
    }
}

// ONNX Runtime folds what depends on constants alone, such as rotary tables, once for each graph, and keeps a copy
// each. Here it is computed once, by ONNX Runtime too, and given under the names that the folded values will have.
void Runtime::share_constants(OrtSessionOptions* options, std::string_view graph, const std::string& path) {
    const ConstantPart part = constant_part(graph);
    if (part.outputs.empty()) return;
    const Owner<OrtSessionOptions> own = session_options(path);
    OrtSessionOptions* made = own.get();
    ort_.check(ort_->SetIntraOpNumThreads(made, 1), path);
    share_weights(made, part.model, path);
    OrtSession* opened = nullptr;
    ort_.check(ort_->CreateSessionFromArray(env_.get(), part.model.data(), part.model.size(), made, &opened), path);
    const Owner<OrtSession> session(opened, ort_->ReleaseSession);
    std::vector<const char*> names;
    for (const std::string& name : part.outputs) names.push_back(name.c_str());
    std::vector<OrtValue*> values(names.size());
    ort_.check(ort_->Run(opened, nullptr, nullptr, nullptr, 0, names.data(), names.size(), values.data()), path);
    OrtValues owned;
    owned.reserve(values.size());
    for (OrtValue* value : values) owned.emplace_back(value, ort_->ReleaseValue);
    for (std::size_t place = 0; place < names.size(); ++place) {
        OrtValue* kept = constant(std::move(owned[place]));
        if (kept != nullptr) ort_.check(ort_->AddInitializer(options, names[place], kept), path);
    }
}

// The one copy of a constant, nullptr of a small one.
OrtValue* Runtime::constant(Owner<OrtValue> value) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    ort_.check(ort_->GetTensorTypeAndShape(value.get(), &info), "a constant");
    const Owner<OrtTensorTypeAndShapeInfo> owner(info, ort_->ReleaseTensorTypeAndShapeInfo);
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    std::size_t count = 0;
    std::size_t rank = 0;
    ort_.check(ort_->GetTensorElementType(info, &type), "a constant");
    ort_.check(ort_->GetTensorShapeElementCount(info, &count), "a constant");
    ort_.check(ort_->GetDimensionsCount(info, &rank), "a constant");
    std::vector<std::int64_t> dims(rank);
    ort_.check(ort_->GetDimensions(info, dims.data(), rank), "a constant");
    const std::size_t bytes = count * element_bytes(type);
    if (bytes < kLeastShared) return nullptr;
    void* data = nullptr;
    ort_.check(ort_->GetTensorMutableData(value.get(), &data), "a constant");
    const auto* from = static_cast<const std::byte*>(data);
    std::string key = sha256_of(from, bytes) + std::to_string(type);
    for (const std::int64_t dim : dims) key += " " + std::to_string(dim);
    Constant& kept = constants_[key];
    if (kept.value.get() == nullptr) {
        kept.bytes.assign(from, from + bytes);
        kept.value = tensor(ort_, memory_.get(), kept.bytes.data(), bytes, dims, type);
    }
    return kept.value.get();
}

OrtValue* Runtime::weight(const ExternalTensor& place, const std::string& path) {
    const auto known = weights_.find(place.name);
    if (known != weights_.end()) {
        if (known->second.place == place) return known->second.value.get();
        bundle_error(path + ": its tensor " + place.name +
                     " stands elsewhere than that of this name before it; export it again");
    }
    const Mapping& file = *bundle_.weights;
    const std::size_t unit = element_bytes(place.type);
    std::uint64_t length = unit;
    bool whole = unit != 0 && place.location == kWeights && place.offset % (unit == 0 ? 1 : unit) == 0;
    for (const std::int64_t dim : place.dims) {
        whole = whole && dim > 0 && !__builtin_mul_overflow(length, static_cast<std::uint64_t>(dim), &length);
    }
    if (!whole || length != place.length || place.offset > file.size() || length > file.size() - place.offset) {
        bundle_error(path + ": its tensor " + place.name + " is not a part of weights.bin; export it again");
    }
    // The mapping is read-only, and initializers are only read.
    auto* data = const_cast<std::byte*>(file.data() + place.offset);
    auto value = tensor(ort_, memory_.get(), data, static_cast<std::size_t>(length), place.dims,
                        static_cast<ONNXTensorElementDataType>(place.type));
    return (weights_[place.name] = {place, std::move(value)}).value.get();
}

const Graph* Runtime::first(Kind kind) const noexcept {
    for (const auto& graph : graphs_) {
        if (graph->entry().kind == kind) return graph.get();
    }
    return nullptr;
}

Told Runtime::told(const Budget& budget) const {
    budget.check();
    return told_of(budget, manifest().cost, manifest().shape, manifest().rules, options_.contract);
}

}  // namespace l2a::core
