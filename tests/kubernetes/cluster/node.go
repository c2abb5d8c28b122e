package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	oci "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	podresources "k8s.io/kubelet/pkg/apis/podresources/v1"
)

// Node is a node: a container runtime and a kubelet, in a mount namespace of their own. What programs on it see below /run, /var,
// /etc and /usr, and shared memory, is the node's alone, so two nodes use the same paths, and the machine's files do not change.
type Node struct {
	Name    string
	Address string
	// Folder is the node's on the machine.
	Folder string

	Runtime *Process
	Kubelet *Process
	// Others are the programs that the test has started on it.
	Others []*Process

	cluster   *Cluster
	runtime   cri.RuntimeServiceClient
	resources podresources.PodResourcesListerClient
}

// The first program on a node makes its mounts.
const mounts = `set -e
folder=$1; shift
mount -t tmpfs tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
for part in etc usr var; do
  mkdir -p "/run/parts/$part/upper" "/run/parts/$part/work"
  mount -t overlay -o "lowerdir=/$part,upperdir=/run/parts/$part/upper,workdir=/run/parts/$part/work" overlay "/$part"
done
mkdir -p "$folder/kubelet" /var/lib/kubelet /run/nvshare /run/cdi
mount --bind "$folder/kubelet" /var/lib/kubelet
exec "$@"
`

// AddNode starts a node, with these labels, and waits until it is ready for pods.
func (c *Cluster) AddNode(ctx context.Context, name string, labels map[string]string) (*Node, error) {
	n := &Node{
		Name: name, Address: fmt.Sprintf("172.20.1.%d", len(c.Nodes)+1), Folder: filepath.Join(c.Folder, name), cluster: c,
	}
	if err := os.MkdirAll(n.Folder, 0o755); err != nil {
		return nil, err
	}
	if err := addAddress(n.Address); err != nil {
		return nil, err
	}
	c.Nodes = append(c.Nodes, n)
	socket := filepath.Join(n.Folder, "cri.sock")
	n.Runtime = newProcess(filepath.Join(c.Folder, "logs"), name+"-runtime", nil,
		"unshare", "--mount", "--", "/bin/sh", "-c", mounts, "sh", n.Folder,
		c.Binary, "runtime", "--listen="+socket, "--state="+filepath.Join(c.layers(), name),
		"--images="+c.Images(), "--address="+n.Address)
	if err := n.Runtime.Start(); err != nil {
		return nil, err
	}
	var err error
	if n.runtime, err = connect(socket, cri.NewRuntimeServiceClient); err != nil {
		return nil, err
	}
	if n.resources, err = connect(filepath.Join(n.Folder, "kubelet/pod-resources/kubelet.sock"), podresources.NewPodResourcesListerClient); err != nil {
		return nil, err
	}
	if err := await(ctx, "the runtime of "+name+" answers", n.Runtime, func(ctx context.Context) error {
		_, err := n.runtime.Version(ctx, &cri.VersionRequest{})
		return err
	}); err != nil {
		return nil, err
	}
	if err := n.startKubelet(ctx, labels); err != nil {
		return nil, err
	}
	return n, nil
}

// connect makes a client for a service on a socket, which need not be there yet.
func connect[T any](socket string, client func(grpc.ClientConnInterface) T) (T, error) {
	connection, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		var none T
		return none, err
	}
	return client(connection), nil
}

// Program prepares a program that runs on the node, beside its containers. The node stops it at the end.
func (n *Node) Program(name string, env []string, argv ...string) *Process {
	process := newProcess(filepath.Join(n.cluster.Folder, "logs"), n.Name+"-"+name, env, n.enter(argv)...)
	n.Others = append(n.Others, process)
	return process
}

// Run runs a command on the node, and gives what it wrote.
func (n *Node) Run(ctx context.Context, env []string, argv ...string) (string, error) {
	entered := n.enter(argv)
	command := exec.CommandContext(ctx, entered[0], entered[1:]...)
	command.Env = append(os.Environ(), env...)
	out, err := command.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s on %s: %w: %s", strings.Join(argv, " "), n.Name, err, out)
	}
	return string(out), nil
}

func (n *Node) enter(argv []string) []string {
	return append([]string{"nsenter", fmt.Sprintf("--mount=/proc/%d/ns/mnt", n.Runtime.Pid()), "--"}, argv...)
}

// Write puts a file on the node.
func (n *Node) Write(ctx context.Context, path, text string) error {
	_, err := n.Run(ctx, []string{"TEXT=" + text}, "/bin/sh", "-c",
		`mkdir -p "$(dirname "$1")" && printf %s "$TEXT" > "$1.new" && mv "$1.new" "$1"`, "sh", path)
	return err
}

// Stop ends what runs on the node: its containers too.
func (n *Node) Stop() {
	for _, process := range append(append([]*Process{}, n.Others...), n.Kubelet, n.Runtime) {
		if process != nil {
			process.Stop()
		}
	}
}

// Devices are the ids of the devices that the kubelet has given to a pod's containers, by resource name, as its pod resources API
// says. They are there as soon as the pod is admitted, before a container starts.
func (n *Node) Devices(ctx context.Context) (map[string]map[string][]string, error) {
	response, err := n.resources.List(ctx, &podresources.ListPodResourcesRequest{})
	if err != nil {
		return nil, err
	}
	found := make(map[string]map[string][]string)
	for _, pod := range response.PodResources {
		devices := make(map[string][]string)
		for _, container := range pod.Containers {
			for _, device := range container.Devices {
				devices[device.ResourceName] = append(devices[device.ResourceName], device.DeviceIds...)
			}
		}
		found[pod.Namespace+"/"+pod.Name] = devices
	}
	return found, nil
}

// Container is a container as it runs.
type Container struct {
	// Pid is its first process, as the test sees it.
	Pid  int       `json:"pid"`
	Spec *oci.Spec `json:"runtimeSpec"`
}

// Env is a variable of the container's environment. Of several with one name the last counts.
func (c *Container) Env(name string) string {
	value := ""
	for _, variable := range c.Spec.Process.Env {
		if text, found := strings.CutPrefix(variable, name+"="); found {
			value = text
		}
	}
	return value
}

// Container finds the running container of a pod.
func (n *Node) Container(ctx context.Context, pod *corev1.Pod, name string) (*Container, error) {
	for _, status := range pod.Status.ContainerStatuses {
		if status.Name != name || status.State.Running == nil {
			continue
		}
		id := status.ContainerID[strings.Index(status.ContainerID, "://")+3:]
		response, err := n.runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id, Verbose: true})
		if err != nil {
			return nil, err
		}
		found := &Container{}
		return found, json.Unmarshal([]byte(response.Info["info"]), found)
	}
	return nil, fmt.Errorf("container %s of pod %s does not run", name, pod.Name)
}

func (n *Node) ready(ctx context.Context) error {
	node, err := n.cluster.Client.CoreV1().Nodes().Get(ctx, n.Name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	for _, condition := range node.Status.Conditions {
		if condition.Type == corev1.NodeReady {
			if condition.Status == corev1.ConditionTrue {
				return nil
			}
			return fmt.Errorf("node %s: %s", n.Name, condition.Message)
		}
	}
	return fmt.Errorf("node %s has no condition %s", n.Name, corev1.NodeReady)
}
