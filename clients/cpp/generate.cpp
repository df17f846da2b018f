// Streams the greedy continuation of one prompt from a Duet server to standard output; what is known about it goes to
// standard error. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
#include <getopt.h>
#include <google/protobuf/util/time_util.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/support/error_details.h>

#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <iostream>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>

#include "duet/inference/v1/inference.grpc.pb.h"
#include "google/rpc/errors.pb.h"

namespace inference = duet::inference::v1;
using std::chrono::milliseconds;

namespace {

constexpr char kUsage[] = "usage: generate [--address HOST:PORT] [--max-tokens N] [--chat] PROMPT";
constexpr int kMaxAttempts = 5;

struct Arguments {
  std::string address = "127.0.0.1:50051";
  std::uint32_t max_tokens = 64;
  bool chat = false;
  std::string prompt;
};

// What Ctrl-C does: it cancels the call that is watched and ends every wait. A second one ends the program.
class Interrupt {
 public:
  // To be called before any thread starts: threads inherit that SIGINT is blocked, so that it reaches only ours.
  Interrupt() {
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);
    std::thread([this, signals] {
      int signal;
      sigwait(&signals, &signal);
      pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
      const std::lock_guard lock(mutex_);
      happened_ = true;
      if (watched_ != nullptr) watched_->TryCancel();
      changed_.notify_all();
    }).detach();
  }

  // Cancels `context` when it happens, and at once where it has happened; nullptr: there is no call.
  void Watch(grpc::ClientContext* context) {
    const std::lock_guard lock(mutex_);
    watched_ = context;
    if (happened_ && context != nullptr) context->TryCancel();
  }

  // Waits for it, at most `delay`; returns whether it has happened.
  bool WaitFor(milliseconds delay) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, delay, [this] { return happened_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool happened_ = false;
  grpc::ClientContext* watched_ = nullptr;
};

// How one stream ended, and whether text was shown before.
struct Outcome {
  grpc::Status status;
  bool printed = false;
};

std::optional<std::uint32_t> ParseUint32(const std::string& digits) {
  if (digits.empty() || digits.find_first_not_of("0123456789") != std::string::npos) return std::nullopt;
  try {
    const unsigned long long value = std::stoull(digits);
    if (value > std::numeric_limits<std::uint32_t>::max()) return std::nullopt;
    return static_cast<std::uint32_t>(value);
  } catch (const std::out_of_range&) {
    return std::nullopt;
  }
}

// The command line, or nothing where it is wrong.
std::optional<Arguments> ParseCommandLine(int argc, char** argv) {
  const option options[] = {{"address", required_argument, nullptr, 'a'},
                            {"max-tokens", required_argument, nullptr, 'm'},
                            {"chat", no_argument, nullptr, 'c'},
                            {nullptr, 0, nullptr, 0}};
  Arguments args;
  opterr = 0;
  for (int flag; (flag = getopt_long(argc, argv, "", options, nullptr)) != -1;) {
    if (flag == 'a') {
      args.address = optarg;
    } else if (flag == 'm') {
      const auto max_tokens = ParseUint32(optarg);
      if (!max_tokens) return std::nullopt;
      args.max_tokens = *max_tokens;
    } else if (flag == 'c') {
      args.chat = true;
    } else {
      return std::nullopt;
    }
  }
  if (argc - optind != 1) return std::nullopt;
  args.prompt = argv[optind];
  return args;
}

inference::GenerateRequest BuildRequest(const Arguments& args) {
  inference::GenerateRequest request;
  if (args.chat) {
    auto* message = request.mutable_chat()->add_messages();
    message->set_role("user");
    message->set_content(args.prompt);
  } else {
    request.set_text(args.prompt);
  }
  request.mutable_sampling()->set_temperature(0);
  request.mutable_stop()->set_max_tokens(args.max_tokens);
  return request;
}

// Prints one stream's events as they come.
Outcome PrintStream(inference::InferenceService::Stub& stub, const inference::GenerateRequest& request,
                    Interrupt& interrupt) {
  grpc::ClientContext context;
  const auto reader = stub.Generate(&context, request);
  interrupt.Watch(&context);
  Outcome outcome;
  std::optional<inference::Finished> finished;
  for (inference::GenerateResponse response; reader->Read(&response);) {
    if (response.has_started()) {
      std::cerr << "request " << response.started().request_id() << std::endl;
    } else if (response.has_delta()) {
      std::cout << response.delta().text() << std::flush;
      outcome.printed = true;
    } else if (response.has_finished()) {
      finished = response.finished();
    }
  }
  outcome.status = reader->Finish();
  interrupt.Watch(nullptr);
  if (outcome.printed) std::cout << std::endl;
  if (!outcome.status.ok()) return outcome;
  if (!finished) {
    outcome.status = grpc::Status(grpc::StatusCode::DATA_LOSS, "the stream was cut");
    return outcome;
  }
  const auto& usage = finished->usage();
  std::cerr << "finished: " << inference::FinishReason_Name(finished->reason()) << ", " << usage.prompt_tokens()
            << " prompt tokens (" << usage.cached_tokens() << " cached), " << usage.output_tokens()
            << " output tokens" << std::endl;
  return outcome;
}

// A detail of a failed call, or nothing where the server sent none of this type.
template <typename Detail>
std::optional<Detail> FindDetail(const grpc::Status& failure) {
  google::rpc::Status status;
  if (!grpc::ExtractErrorDetails(failure, &status).ok()) return std::nullopt;
  Detail detail;
  for (const auto& packed : status.details()) {
    if (packed.UnpackTo(&detail)) return detail;
  }
  return std::nullopt;
}

// The time after which the server asks to be called again, or nothing where it does not.
std::optional<milliseconds> RetryDelay(const grpc::Status& failure) {
  const auto code = failure.error_code();
  if (code != grpc::StatusCode::UNAVAILABLE && code != grpc::StatusCode::RESOURCE_EXHAUSTED) return std::nullopt;
  const auto retry = FindDetail<google::rpc::RetryInfo>(failure);
  if (!retry) return std::nullopt;
  return milliseconds(google::protobuf::util::TimeUtil::DurationToMilliseconds(retry->retry_delay()));
}

std::string Describe(const grpc::Status& failure) {
  std::string text =
      google::rpc::Code_Name(static_cast<google::rpc::Code>(failure.error_code())) + ": " + failure.error_message();
  const auto bad = FindDetail<google::rpc::BadRequest>(failure);
  if (bad && bad->field_violations_size() > 0) text += " [field " + bad->field_violations(0).field() + "]";
  return text;
}

// Streams until it is done or fails for good; returns the exit status.
int Generate(inference::InferenceService::Stub& stub, const inference::GenerateRequest& request,
             Interrupt& interrupt) {
  for (int attempt = 1;; ++attempt) {
    const auto [status, printed] = PrintStream(stub, request, interrupt);
    if (status.ok()) return 0;
    if (interrupt.WaitFor(milliseconds(0))) return 130;
    const auto delay = RetryDelay(status);
    if (printed || !delay || attempt == kMaxAttempts) {
      std::cerr << "error: " << Describe(status) << std::endl;
      return 1;
    }
    std::cerr << Describe(status) << "; trying again in " << delay->count() << " ms" << std::endl;
    if (interrupt.WaitFor(*delay)) return 130;
  }
}

}  // namespace

int main(int argc, char** argv) {
  auto& interrupt = *new Interrupt;  // never deleted: its thread lasts as long as the program
  const auto args = ParseCommandLine(argc, argv);
  if (!args) {
    std::cerr << kUsage << std::endl;
    return 2;
  }
  grpc::ChannelArguments options;
  options.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);  // one meant for web traffic must not swallow calls to the loopback
  const auto channel = grpc::CreateCustomChannel(args->address, grpc::InsecureChannelCredentials(), options);
  const auto stub = inference::InferenceService::NewStub(channel);
  return Generate(*stub, BuildRequest(*args), interrupt);
}
