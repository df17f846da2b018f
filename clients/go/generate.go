// Command generate streams the greedy continuation of one prompt from a Duet server to standard output; what is known
// about it goes to standard error. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"os/signal"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	inference "duet/inference/v1"
)

const (
	usage       = "usage: generate [--address HOST:PORT] [--max-tokens N] [--chat] PROMPT"
	maxAttempts = 5
)

type arguments struct {
	address   string
	maxTokens uint
	chat      bool
	prompt    string
}

// parseCommandLine reports whether the command line is right.
func parseCommandLine(argv []string) (args arguments, ok bool) {
	flags := flag.NewFlagSet("generate", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&args.address, "address", "127.0.0.1:50051", "")
	flags.UintVar(&args.maxTokens, "max-tokens", 64, "")
	flags.BoolVar(&args.chat, "chat", false, "")
	err := flags.Parse(argv)
	args.prompt = flags.Arg(0)
	return args, err == nil && flags.NArg() == 1 && args.maxTokens <= math.MaxUint32
}

func buildRequest(args arguments) *inference.GenerateRequest {
	request := &inference.GenerateRequest{
		Prompt:   &inference.GenerateRequest_Text{Text: args.prompt},
		Sampling: &inference.SamplingParams{Temperature: proto.Float32(0)},
		Stop:     &inference.StopConditions{MaxTokens: proto.Uint32(uint32(args.maxTokens))},
	}
	if args.chat {
		message := &inference.ChatMessage{Role: proto.String("user"), Content: proto.String(args.prompt)}
		chat := &inference.Chat{Messages: []*inference.ChatMessage{message}}
		request.Prompt = &inference.GenerateRequest_Chat{Chat: chat}
	}
	return request
}

// printStream prints one stream's events as they come. It returns whether text was shown, and the call's status.
func printStream(
	ctx context.Context, client inference.InferenceServiceClient, request *inference.GenerateRequest,
) (printed bool, err error) {
	stream, err := client.Generate(ctx, request)
	if err != nil {
		return false, err
	}
	var finished *inference.Finished
	for {
		var response *inference.GenerateResponse
		if response, err = stream.Recv(); err != nil {
			break
		}
		switch event := response.Event.(type) {
		case *inference.GenerateResponse_Started:
			fmt.Fprintf(os.Stderr, "request %s\n", event.Started.RequestId)
		case *inference.GenerateResponse_Delta:
			fmt.Print(event.Delta.Text)
			printed = true
		case *inference.GenerateResponse_Finished:
			finished = event.Finished
		}
	}
	if printed {
		fmt.Println()
	}
	if !errors.Is(err, io.EOF) {
		return printed, err
	}
	if finished == nil {
		return printed, status.Error(codes.DataLoss, "the stream was cut")
	}
	fmt.Fprintf(os.Stderr, "finished: %s, %d prompt tokens (%d cached), %d output tokens\n", finished.Reason,
		finished.Usage.GetPromptTokens(), finished.Usage.GetCachedTokens(), finished.Usage.GetOutputTokens())
	return printed, nil
}

// retryDelay returns the time after which the server asks to be called again, and whether it does.
func retryDelay(failure *status.Status) (time.Duration, bool) {
	if failure.Code() != codes.Unavailable && failure.Code() != codes.ResourceExhausted {
		return 0, false
	}
	for _, detail := range failure.Details() {
		if retry, ok := detail.(*errdetails.RetryInfo); ok {
			return retry.GetRetryDelay().AsDuration(), true
		}
	}
	return 0, false
}

func describe(failure *status.Status) string {
	text := fmt.Sprintf("%s: %s", code.Code(failure.Code()), failure.Message())
	for _, detail := range failure.Details() {
		if bad, ok := detail.(*errdetails.BadRequest); ok && len(bad.GetFieldViolations()) > 0 {
			text += fmt.Sprintf(" [field %s]", bad.GetFieldViolations()[0].GetField())
		}
	}
	return text
}

// generate streams until it is done or fails for good; it returns the exit status.
func generate(
	ctx context.Context, client inference.InferenceServiceClient, request *inference.GenerateRequest,
) int {
	for attempt := 1; ; attempt++ {
		printed, err := printStream(ctx, client, request)
		if err == nil {
			return 0
		}
		if ctx.Err() != nil {
			return 130
		}
		failure := status.Convert(err)
		delay, wanted := retryDelay(failure)
		if printed || !wanted || attempt == maxAttempts {
			fmt.Fprintf(os.Stderr, "error: %s\n", describe(failure))
			return 1
		}
		fmt.Fprintf(os.Stderr, "%s; trying again in %d ms\n", describe(failure), delay.Milliseconds())
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return 130
		}
	}
}

func run(argv []string) int {
	args, ok := parseCommandLine(argv)
	if !ok {
		fmt.Fprintln(os.Stderr, usage)
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	// A proxy meant for web traffic must not swallow calls to the loopback.
	connection, err := grpc.DialContext(ctx, args.address, grpc.WithInsecure(), grpc.WithNoProxy())
	if err != nil {
		fmt.Fprintf(os.Stderr, "error: %s\n", err)
		return 1
	}
	defer connection.Close()
	return generate(ctx, inference.NewInferenceServiceClient(connection), buildRequest(args))
}

func main() {
	os.Exit(run(os.Args[1:]))
}
