// Package cluster runs a Kubernetes cluster on one machine, for tests: Kubernetes' own components as processes, each started as a
// distribution would start it, and nodes whose kubelets run containers.
//
// Read it in this order: machine.go makes room on the machine; etcd.go, apiserver.go, controllers.go and scheduler.go are the control
// plane, each with the options that it needs; node.go and kubelet.go make a node; pods.go watches what becomes of pods.
package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

// Config says what a cluster is made of.
type Config struct {
	// Binary is the program with the components (cmd/kubernetes).
	Binary string
	// Folder is where everything is kept: data, certificates, logs.
	Folder string
	// SchedulerConfig is a KubeSchedulerConfiguration; empty for the scheduler's defaults.
	SchedulerConfig string
}

// Cluster is a control plane and its nodes.
type Cluster struct {
	Config
	// Kubeconfig is an administrator's.
	Kubeconfig string
	// Client is that administrator.
	Client kubernetes.Interface

	Etcd        *Process
	APIServer   *Process
	Controllers *Process
	Scheduler   *Process
	Nodes       []*Node

	authority *authority
}

// Start starts a control plane without nodes.
func Start(ctx context.Context, config Config) (*Cluster, error) {
	c := &Cluster{Config: config}
	for _, folder := range []string{"logs", "certificates", "layers"} {
		if err := os.MkdirAll(filepath.Join(c.Folder, folder), 0o755); err != nil {
			return nil, err
		}
	}
	// A layer of an overlay may not lie below another one, and the machine's root is one of a container's layers.
	if err := unix.Mount("tmpfs", c.layers(), "tmpfs", 0, "mode=755"); err != nil {
		return nil, fmt.Errorf("mount a file system for images and containers: %w", err)
	}
	if err := os.Mkdir(c.Images(), 0o755); err != nil {
		return nil, err
	}
	var err error
	if c.authority, err = newAuthority(filepath.Join(c.Folder, "certificates")); err != nil {
		return nil, err
	}
	// The group that may do everything.
	if c.Kubeconfig, err = c.authority.client("admin", "admin", "system:masters"); err != nil {
		return nil, err
	}
	rest, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig)
	if err != nil {
		return nil, err
	}
	// The tests ask often.
	rest.QPS, rest.Burst = 500, 500
	if c.Client, err = kubernetes.NewForConfig(rest); err != nil {
		return nil, err
	}
	for _, step := range []func(context.Context) error{c.startEtcd, c.startAPIServer, c.startControllers, c.startScheduler} {
		if err := step(ctx); err != nil {
			c.Stop()
			return nil, err
		}
	}
	return c, nil
}

// Stop ends everything.
func (c *Cluster) Stop() {
	for _, node := range c.Nodes {
		node.Stop()
	}
	for _, process := range []*Process{c.Scheduler, c.Controllers, c.APIServer, c.Etcd} {
		if process != nil {
			process.Stop()
		}
	}
	_ = unix.Unmount(c.layers(), unix.MNT_DETACH)
}

// layers is where images are, and what containers write.
func (c *Cluster) layers() string { return filepath.Join(c.Folder, "layers") }

// Images is the folder of images, each a folder that has the image's name. They are on all nodes.
func (c *Cluster) Images() string { return filepath.Join(c.layers(), "images") }

// component prepares one of Kubernetes' components.
func (c *Cluster) component(name string, options ...string) *Process {
	return newProcess(filepath.Join(c.Folder, "logs"), name, nil, append([]string{c.Binary, name}, options...)...)
}

// write puts a file into the cluster's folder; the path is the answer.
func (c *Cluster) write(name, text string) (string, error) {
	path := filepath.Join(c.Folder, name)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		return "", fmt.Errorf("write %s: %w", path, err)
	}
	return path, nil
}
