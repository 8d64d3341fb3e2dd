// A chat on token ids: an example application, not a tool. Each line of the input is a prompt, as ids that end in
// <think> (it is added where it is missing), or `:budget X` for those that follow. Tokens are printed as they are
// written.
//
//     l2a_chat BUNDLE [BUDGET | auto COSTS.json]
#include <cstdlib>
#include <iostream>
#include <l2a/l2a.hpp>
#include <memory>
#include <sstream>

#include "steering.hpp"

namespace {

std::vector<int64_t> ids_of(const std::string& line, int64_t think) {
    std::istringstream words(line);
    std::vector<int64_t> ids;
    for (int64_t id = 0; words >> id;) ids.push_back(id);
    if (!words.eof()) throw std::runtime_error("not token ids: " + line);
    if (ids.empty() || ids.back() != think) ids.push_back(think);
    return ids;
}

void answer(l2a::Engine& engine, const std::vector<int64_t>& prompt, l2a::RequestOptions options, Steering* steering) {
    if (steering != nullptr) {
        const l2a_decision now = steering->decide(engine.statistics(), static_cast<int64_t>(prompt.size()));
        if (now.admit == 0) {
            std::cout << "# there is no memory for another step; ask again later\n";
            return;
        }
        options.budget = now.budget;
    }
    const l2a::Request request = engine.submit(prompt, options);
    std::size_t told = 0;
    while (!request.done()) {
        engine.step();
        const std::vector<int64_t> written = request.tokens();
        for (; told < written.size(); ++told) std::cout << written[told] << ' ' << std::flush;
        if (steering != nullptr) {  // from its next token on; a cap on reasoning is for requests that have not begun
            l2a::Budget budget = steering->decide(engine.statistics(), 0).budget;
            budget.think_tokens = options.budget.think_tokens;
            request.set_budget(budget);
        }
    }
    const l2a_request_info info = request.info();
    std::cout << "\n# budget " << info.budget.compute << ", cost " << info.cost << ", " << info.layers << " layers, "
              << info.heads << " KV groups\n";
    request.forget();
}

int run(int count, char** arguments) {
    if (count < 2) {
        std::cerr << "usage: l2a_chat BUNDLE [BUDGET | auto COSTS.json]\n";
        return 2;
    }
    const l2a::Runtime runtime(arguments[1]);
    l2a::EngineOptions one;
    one.max_rows = 1;
    l2a::Engine engine(runtime, one);
    l2a::RequestOptions options;
    std::unique_ptr<Steering> steering;
    const std::string budget = count > 2 ? arguments[2] : "1";
    if (budget == "auto") {
        if (count < 4) throw std::runtime_error("auto needs a cost table, as `l2a bench --out` writes it");
        steering = std::make_unique<Steering>(runtime, arguments[3]);
    } else {
        options.budget = l2a::budget(std::stod(budget));
    }
    for (std::string line; std::getline(std::cin, line);) {
        if (line.rfind(":budget ", 0) == 0) {
            options.budget = l2a::budget(std::stod(line.substr(8)));
            continue;
        }
        if (!line.empty()) answer(engine, ids_of(line, runtime.model().think), options, steering.get());
    }
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    try {
        return run(count, arguments);
    } catch (const std::exception& error) {
        std::cerr << "l2a_chat: " << error.what() << '\n';
        return 1;
    }
}
