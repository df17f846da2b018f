import com.google.protobuf.Any;
import com.google.protobuf.Duration;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import com.google.rpc.BadRequest;
import com.google.rpc.RetryInfo;
import duet.inference.v1.Inference.ChatMessage;
import duet.inference.v1.Inference.Finished;
import duet.inference.v1.Inference.GenerateRequest;
import duet.inference.v1.Inference.GenerateResponse;
import duet.inference.v1.InferenceServiceGrpc;
import duet.inference.v1.InferenceServiceGrpc.InferenceServiceBlockingStub;
import io.grpc.Context;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.io.FileDescriptor;
import java.io.FileOutputStream;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Iterator;
import java.util.List;
import java.util.Optional;
import java.util.Set;
import java.util.concurrent.TimeUnit;

/**
 * Streams the greedy continuation of one prompt from a Duet server to standard output; what is known about it goes to
 * standard error. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
 */
public final class Generate {
  private static final String USAGE = "usage: generate [--address HOST:PORT] [--max-tokens N] [--chat] PROMPT";
  private static final int MAX_ATTEMPTS = 5;
  private static final Set<Status.Code> RETRIED = Set.of(Status.Code.UNAVAILABLE, Status.Code.RESOURCE_EXHAUSTED);

  // UTF-8 in every locale, unlike System.out.
  private static final PrintStream OUT = utf8(FileDescriptor.out);
  private static final PrintStream ERR = utf8(FileDescriptor.err);

  private record Arguments(String address, int maxTokens, boolean chat, String prompt) {}

  /** A call that failed. */
  private static final class Failure extends Exception {
    final Status status;
    final com.google.rpc.Status details;
    final boolean printed; // whether text was shown before

    Failure(StatusRuntimeException error, boolean printed) {
      super(error);
      this.status = error.getStatus();
      this.details = StatusProto.fromThrowable(error);
      this.printed = printed;
    }

    /** A detail, or nothing where the server sent none of this type. */
    <T extends Message> Optional<T> detail(Class<T> type) {
      for (Any packed : details.getDetailsList()) {
        if (packed.is(type)) {
          try {
            return Optional.of(packed.unpack(type));
          } catch (InvalidProtocolBufferException error) {
            return Optional.empty();
          }
        }
      }
      return Optional.empty();
    }

    /** Milliseconds after which the server asks to be called again, or nothing where it does not. */
    Optional<Long> retryDelay() {
      return RETRIED.contains(status.getCode())
          ? detail(RetryInfo.class).map(RetryInfo::getRetryDelay).map(Generate::toMillis)
          : Optional.empty();
    }

    String describe() {
      String field =
          detail(BadRequest.class)
              .filter(bad -> bad.getFieldViolationsCount() > 0)
              .map(bad -> " [field " + bad.getFieldViolations(0).getField() + "]")
              .orElse("");
      String cause = status.getCause() == null ? "" : " (" + status.getCause().getMessage() + ")";
      return status.getCode() + ": " + status.getDescription() + cause + field;
    }
  }

  /** The command line, or nothing where it is wrong. */
  private static Optional<Arguments> parseCommandLine(String[] argv) {
    String address = "127.0.0.1:50051";
    int maxTokens = 64;
    boolean chat = false;
    List<String> prompts = new ArrayList<>();
    Iterator<String> words = List.of(argv).iterator();
    while (words.hasNext()) {
      String[] word = words.next().split("=", 2); // --flag=VALUE is --flag VALUE
      boolean isValued = word[0].equals("--address") || word[0].equals("--max-tokens");
      if (isValued && word.length == 1 && !words.hasNext()) {
        return Optional.empty();
      }
      String value = isValued ? (word.length == 2 ? word[1] : words.next()) : String.join("=", word);
      if (word[0].equals("--address")) {
        address = value;
      } else if (word[0].equals("--max-tokens")) {
        try {
          maxTokens = Integer.parseUnsignedInt(value);
        } catch (NumberFormatException error) {
          return Optional.empty();
        }
      } else if (value.equals("--chat")) {
        chat = true;
      } else if (value.equals("--")) {
        words.forEachRemaining(prompts::add);
      } else if (value.startsWith("--")) {
        return Optional.empty();
      } else {
        prompts.add(value);
      }
    }
    return prompts.size() == 1
        ? Optional.of(new Arguments(address, maxTokens, chat, prompts.get(0)))
        : Optional.empty();
  }

  private static GenerateRequest buildRequest(Arguments args) {
    GenerateRequest.Builder request = GenerateRequest.newBuilder();
    if (args.chat) {
      request.getChatBuilder().addMessages(ChatMessage.newBuilder().setRole("user").setContent(args.prompt));
    } else {
      request.setText(args.prompt);
    }
    request.getSamplingBuilder().setTemperature(0);
    request.getStopBuilder().setMaxTokens(args.maxTokens);
    return request.build();
  }

  /** Prints one stream's events as they come. */
  private static void printStream(InferenceServiceBlockingStub stub, GenerateRequest request) throws Failure {
    boolean printed = false;
    Finished finished = null;
    try {
      Iterator<GenerateResponse> responses = stub.generate(request);
      while (responses.hasNext()) {
        GenerateResponse response = responses.next();
        switch (response.getEventCase()) {
          case STARTED -> ERR.println("request " + response.getStarted().getRequestId());
          case DELTA -> {
            OUT.print(response.getDelta().getText());
            printed = true;
            if (OUT.checkError()) { // which also flushes
              throw Status.CANCELLED.withDescription("nobody reads the output").asRuntimeException();
            }
          }
          case FINISHED -> finished = response.getFinished();
          default -> {} // an event of a newer server
        }
      }
      if (finished == null) {
        throw Status.DATA_LOSS.withDescription("the stream was cut").asRuntimeException();
      }
    } catch (StatusRuntimeException error) {
      throw new Failure(error, printed);
    } finally {
      if (printed) {
        OUT.println();
      }
    }
    ERR.printf(
        "finished: %s, %d prompt tokens (%d cached), %d output tokens%n",
        finished.getReason(),
        finished.getUsage().getPromptTokens(),
        finished.getUsage().getCachedTokens(),
        finished.getUsage().getOutputTokens());
  }

  /** Streams until it is done or fails for good; returns the exit status. */
  private static int generate(InferenceServiceBlockingStub stub, GenerateRequest request, Context interruptible)
      throws InterruptedException {
    for (int attempt = 1; ; attempt++) {
      try {
        printStream(stub, request);
        return 0;
      } catch (Failure failure) {
        if (interruptible.isCancelled()) {
          return 130;
        }
        Optional<Long> delay = failure.retryDelay();
        if (failure.printed || delay.isEmpty() || attempt == MAX_ATTEMPTS) {
          ERR.println("error: " + failure.describe());
          return 1;
        }
        ERR.println(failure.describe() + "; trying again in " + delay.get() + " ms");
        Thread.sleep(delay.get());
      }
    }
  }

  private static long toMillis(Duration duration) {
    return duration.getSeconds() * 1000 + duration.getNanos() / 1_000_000;
  }

  private static PrintStream utf8(FileDescriptor file) {
    return new PrintStream(new FileOutputStream(file), true, StandardCharsets.UTF_8);
  }

  /** Cancels the call in progress and gives its cancellation the time to leave; Ctrl-C runs this. */
  private static void close(Context.CancellableContext interruptible, ManagedChannel channel) {
    interruptible.cancel(null);
    try {
      channel.shutdown().awaitTermination(1, TimeUnit.SECONDS);
    } catch (InterruptedException error) {
      Thread.currentThread().interrupt();
    }
  }

  public static void main(String[] argv) throws InterruptedException {
    Optional<Arguments> args = parseCommandLine(argv);
    if (args.isEmpty()) {
      ERR.println(USAGE);
      System.exit(2);
    }
    ManagedChannel channel =
        Grpc.newChannelBuilder(args.get().address, InsecureChannelCredentials.create()).build();
    Context.CancellableContext interruptible = Context.current().withCancellation();
    Runtime.getRuntime().addShutdownHook(new Thread(() -> close(interruptible, channel)));
    interruptible.attach();
    System.exit(generate(InferenceServiceGrpc.newBlockingStub(channel), buildRequest(args.get()), interruptible));
  }
}
