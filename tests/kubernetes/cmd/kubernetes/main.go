// Command kubernetes is what a cluster is made of, in one program: etcd, Kubernetes' own API server, controller manager,
// scheduler and kubelet, and a container runtime. Its first argument says which of them to be; the others are that
// component's usual options.
//
// One program for all of them links Kubernetes' libraries once.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"k8s.io/component-base/cli"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"

	"nvshare.test/kubernetes/etcd"
	"nvshare.test/kubernetes/runtime"
)

var components = map[string]func() *cobra.Command{
	"etcd":                    etcd.Command,
	"kube-apiserver":          apiserver.NewAPIServerCommand,
	"kube-controller-manager": controllermanager.NewControllerManagerCommand,
	"kube-scheduler":          func() *cobra.Command { return scheduler.NewSchedulerCommand() },
	"kubelet":                 func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) },
	"runtime":                 runtime.Command,
}

func main() {
	if len(os.Args) > 1 {
		if component, known := components[os.Args[1]]; known {
			// Each component reads os.Args as if it had a program of its own.
			os.Args = append([]string{filepath.Base(os.Args[1])}, os.Args[2:]...)
			os.Exit(cli.Run(component()))
		}
	}
	fmt.Fprintln(os.Stderr, "usage: kubernetes etcd|kube-apiserver|kube-controller-manager|kube-scheduler|kubelet|runtime [option]...")
	os.Exit(2)
}
