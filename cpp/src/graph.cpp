#include "graph.hpp"

#include <onnxruntime_run_options_config_keys.h>

#include <charconv>

namespace l2a::core {
namespace {

constexpr std::string_view kPast = "past_key_values.";
constexpr std::int64_t kManyTokens = 64;  // a run of more takes far more memory than the steps behind it
constexpr ONNXTensorElementDataType kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr ONNXTensorElementDataType kInt64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

bool is_float(ONNXTensorElementDataType type) noexcept {
    return type == kFloat || type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ||
           type == ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
}

// Of runs whose arena gives back to the system what is free behind them.
Owner<OrtRunOptions> giving_back(const Ort& ort) {
    OrtRunOptions* found = nullptr;
    ort.check(ort->CreateRunOptions(&found), "options of a run");
    Owner<OrtRunOptions> owner(found, ort->ReleaseRunOptions);
    ort.check(ort->AddRunConfigEntry(found, kOrtRunOptionsConfigEnableMemoryArenaShrinkage, "cpu:0"),
              "options of a run");
    return owner;
}

}  // namespace

// Small tensors of one run and the arrays that ONNX Runtime takes.
class Graph::Values {
  public:
    std::vector<const char*> names;
    std::vector<OrtValue*> values;

    Values(const Graph& graph, std::size_t count) : graph_(graph) {
        names.reserve(count);
        values.reserve(count);
        owners_.reserve(count);
    }
    void add(const std::string& name, OrtValue* value) {
        names.push_back(name.c_str());
        values.push_back(value);
    }
    template <typename T>
    void add(const std::string& name, const T* data, const std::vector<std::int64_t>& dims,
             ONNXTensorElementDataType type) {
        if (data == nullptr) config_error(graph_.path_ + ": the run has no array for " + name);
        std::size_t bytes = sizeof(T);
        for (const std::int64_t dim : dims) bytes *= static_cast<std::size_t>(dim);
        // ONNX Runtime takes inputs through the same type as outputs, and does not write them.
        auto* writable = const_cast<T*>(data);
        owners_.push_back(tensor(graph_.ort_, graph_.memory_.get(), writable, bytes, dims, type));
        add(name, owners_.back().get());
    }

  private:
    const Graph& graph_;
    OrtValues owners_;
};

Graph::Graph(const Ort& ort, Owner<OrtSession> session, GraphEntry entry, const Shape& shape, std::string path)
    : ort_(ort),
      session_(std::move(session)),
      memory_(arena_memory(ort)),
      giving_back_(giving_back(ort)),
      entry_(std::move(entry)),
      path_(std::move(path)),
      layers_(shape.num_layers),
      vocabulary_(shape.vocab_size) {
    const std::vector<std::string> found = names(true);
    for (std::size_t place = 0; place < found.size(); ++place) {
        if (found[place].compare(0, kPast.size(), kPast) != 0) {
            inputs_.push_back(found[place]);
            continue;
        }
        caches_.push_back(cache_of(place, found[place], shape));
        narrow_ = narrow_ || caches_.back().groups < shape.num_groups;
    }
    for (std::string& name : names(false)) {
        if (name.compare(0, 8, "present.") != 0) outputs_.push_back(std::move(name));
    }
}

std::vector<std::string> Graph::names(bool inputs) const {
    OrtAllocator* allocator = nullptr;
    ort_.check(ort_->GetAllocatorWithDefaultOptions(&allocator), "an allocator");
    std::size_t count = 0;
    ort_.check((inputs ? ort_->SessionGetInputCount : ort_->SessionGetOutputCount)(session_.get(), &count), path_);
    std::vector<std::string> found;
    for (std::size_t place = 0; place < count; ++place) {
        char* name = nullptr;
        ort_.check(
            (inputs ? ort_->SessionGetInputName : ort_->SessionGetOutputName)(session_.get(), place, allocator, &name),
            path_);
        found.emplace_back(name);
        ort_.check(ort_->AllocatorFree(allocator, name), path_);
    }
    return found;
}

CacheInput Graph::cache_of(std::size_t place, const std::string& name, const Shape& sizes) const {
    OrtTypeInfo* info = nullptr;
    ort_.check(ort_->SessionGetInputTypeInfo(session_.get(), place, &info), path_);
    const Owner<OrtTypeInfo> owner(info, ort_->ReleaseTypeInfo);
    const OrtTensorTypeAndShapeInfo* shape = nullptr;
    ort_.check(ort_->CastTypeInfoToTensorInfo(info, &shape), path_);
    std::size_t rank = 0;
    CacheInput cache;
    if (shape != nullptr) {
        ort_.check(ort_->GetDimensionsCount(shape, &rank), path_);
        ort_.check(ort_->GetTensorElementType(shape, &cache.type), path_);
    }
    std::vector<std::int64_t> dims(rank);
    if (rank > 0) ort_.check(ort_->GetDimensions(shape, dims.data(), rank), path_);
    const char* digits = name.data() + kPast.size();
    const char* end = name.data() + name.size();
    const auto [rest, code] = std::from_chars(digits, end, cache.layer);
    const std::string_view part(rest, static_cast<std::size_t>(end - rest));
    const bool known = code == std::errc() && cache.layer >= 0 && cache.layer < sizes.num_layers &&
                       (part == ".key" || part == ".value") &&
                       name == std::string(kPast) + std::to_string(cache.layer) + std::string(part);
    const std::int64_t groups =
        known && !entry_.widths.empty() ? entry_.widths[static_cast<std::size_t>(cache.layer)] : sizes.num_groups;
    if (!known || rank != 4 || dims[1] != groups || dims[3] != sizes.head_dim || !is_float(cache.type)) {
        throw Error(L2A_ERROR_BUNDLE, path_ + ": its input " + name + " is no cache of this model; export it again");
    }
    cache.past = name;
    cache.present = "present." + name.substr(kPast.size());
    cache.is_key = part == ".key";
    cache.groups = dims[1];
    cache.head_dim = dims[3];
    return cache;
}

Owner<OrtValue> Graph::view(const CacheInput& cache, void* data, std::int64_t batch, std::int64_t capacity) const {
    const auto count = static_cast<std::size_t>(batch * cache.groups * capacity * cache.head_dim);
    return tensor(ort_, memory_.get(), data, count * element_bytes(cache.type),
                  {batch, cache.groups, capacity, cache.head_dim}, cache.type);
}

void Graph::put(Values& values, const std::string& name, const Run& run) const {
    const std::int64_t batch = run.batch;
    if (name == "input_ids") return values.add(name, run.input_ids, {batch, run.sequence}, kInt64);
    if (name == "attention_mask") return values.add(name, run.mask, {batch, run.total}, kInt64);
    if (name == "budget") return values.add(name, run.budget, {batch, 2}, kFloat);
    if (name == "limits") return values.add(name, run.limits, {batch, 3}, kInt64);
    if (name == "price") return values.add(name, run.price, {batch}, kFloat);
    if (name == "allocation") return values.add(name, run.allocation, {batch, layers_}, kInt64);
    if (name == "logits") return values.add(name, run.logits, {batch, 1, vocabulary_}, kFloat);
    if (name == "kept_groups") return values.add(name, run.kept_groups, {batch, layers_}, kInt64);
    if (name == "tau") return values.add(name, run.tau, {batch}, kFloat);
    if (name == "variant") return values.add(name, run.variant, {batch}, kInt64);
    throw Error(L2A_ERROR_BUNDLE, path_ + ": has an input or output " + name + ", which is not known; export it again");
}

void Graph::run(const Run& run) const {
    if (run.batch < 1 || run.sequence < 1 || run.total < run.sequence) config_error(path_ + ": a run of no tokens");
    if (!caches_.empty() && (run.caches == nullptr || run.caches->size() != caches_.size())) {
        config_error(path_ + ": the run has not one buffer for each cache");
    }
    Values inputs(*this, inputs_.size() + caches_.size());
    Values outputs(*this, outputs_.size() + caches_.size());
    for (const std::string& name : inputs_) put(inputs, name, run);
    for (const std::string& name : outputs_) put(outputs, name, run);
    for (std::size_t place = 0; place < caches_.size(); ++place) {  // one buffer as past and present: in place
        OrtValue* value = (*run.caches)[place].get();
        inputs.add(caches_[place].past, value);
        outputs.add(caches_[place].present, value);
    }
    const bool large = run.batch * run.sequence >= kManyTokens;
    const OrtRunOptions* options = large ? giving_back_.get() : nullptr;
    ort_.check(ort_->Run(session_.get(), options, inputs.names.data(), inputs.values.data(), inputs.values.size(),
                         outputs.names.data(), outputs.names.size(), outputs.values.data()),
               path_ + ": onnxruntime cannot run it");
}

}  // namespace l2a::core
