// Package runtime is a small container runtime: the kubelet calls it over the CRI (Container Runtime Interface), and it runs
// containers with runc.
//
// Containers are as real as with containerd: namespaces, mounts, control groups, capabilities, limits, and CDI devices, which
// CDI's own library adds. What it saves is what the tests do not look at, and 80 pods on two cores feel: no image is pulled or
// unpacked, no process is left beside each pod, and all pods have the node's network.
//
//   - An image is a folder below --images: `nvshare:1.0` is --images/nvshare:1.0. A container's root is that folder over the node's
//     own root, and what the container writes is gone with it.
//   - A pod's sandbox is a row in a table. Pods that share a pid namespace among their containers are refused.
package runtime

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"tags.cncf.io/container-device-interface/pkg/cdi"
)

// Options say where the runtime finds and keeps things.
type Options struct {
	// Listen is the path of the socket that the kubelet connects to.
	Listen string
	// State is a folder for containers' roots. It and Images are on a file system that is not the root's, nor an overlay.
	State string
	// Images is the folder of images.
	Images string
	// CDI are the folders of CDI specs.
	CDI []string
	// Address is the pods' IP address: the node's own.
	Address string

	// controlGroup is above those of all containers. It is this runtime's alone: others on the machine remove theirs when they end.
	controlGroup string
}

// Command serves the CRI until it is told to end (SIGTERM).
func Command() *cobra.Command {
	var options Options
	command := &cobra.Command{
		Use:          "runtime",
		SilenceUsage: true,
		RunE:         func(*cobra.Command, []string) error { return serve(options) },
	}
	flags := command.Flags()
	flags.StringVar(&options.Listen, "listen", "", "path of the socket for the kubelet")
	flags.StringVar(&options.State, "state", "", "folder for containers' roots")
	flags.StringVar(&options.Images, "images", "", "folder of images, each a folder")
	flags.StringSliceVar(&options.CDI, "cdi-dir", cdi.DefaultSpecDirs, "folders of CDI specs")
	flags.StringVar(&options.Address, "address", "", "the pods' IP address")
	return command
}

func serve(options Options) error {
	// The parent of a container's first process is `runc create`, which ends. The process is then ours, to wait for.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become the parent of orphans: %w", err)
	}
	if err := os.MkdirAll(options.State, 0o700); err != nil {
		return err
	}
	if err := os.Remove(options.Listen); err != nil && !os.IsNotExist(err) {
		return err
	}
	listener, err := net.Listen("unix", options.Listen)
	if err != nil {
		return err
	}
	options.controlGroup = "/nvshare-test-" + uuid.NewString()
	server := grpc.NewServer()
	service := &service{
		options:    options,
		sandboxes:  make(map[string]*sandbox),
		containers: make(map[string]*container),
	}
	cri.RegisterRuntimeServiceServer(server, service)
	cri.RegisterImageServiceServer(server, &images{options: options})
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	go func() {
		<-ctx.Done()
		server.Stop()
	}()
	defer service.removeAll()
	return server.Serve(listener)
}
