package kubernetes

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"

	"nvshare.test/kubernetes/cluster"
)

const (
	// Where the simulated driver is on a node, and in containers that have a simulated GPU.
	driver = "/usr/lib/simulated-gpu"
	// The kind of the CDI devices that put a simulated GPU into a container, as `nvidia.com/gpu` puts a real one.
	simulatedKind = "simulated.nvshare.com/gpu"
	// An image with programs that use a GPU, and with nothing of nvshare.
	applicationImage = "application:1"
	resourceName     = "nvshare.com/gpu"
	// Lines in this file of a node are faults that its simulated GPUs have (tests/simnvml/src/faults.rs).
	faults = "/dev/shm/faults"
)

// lab is a cluster in which nvshare is tried.
type lab struct {
	*testing.T
	ctx context.Context
	*cluster.Cluster
	// built is the folder with what cargo has built.
	built string
}

// newLab starts a control plane and makes images. It ends with the test.
func newLab(t *testing.T, schedulerConfig string) *lab {
	t.Helper()
	folder, err := os.MkdirTemp("/tmp", "nvshare-k8s-")
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{T: t, ctx: t.Context(), built: setting("NVSHARE_TEST_BUILT", "../../target/release")}
	if l.built, err = filepath.Abs(l.built); err != nil {
		t.Fatal(err)
	}
	binary, err := filepath.Abs(setting("NVSHARE_TEST_KUBERNETES", "../../target/kubernetes/kubernetes"))
	if err != nil {
		t.Fatal(err)
	}
	started := time.Now()
	// Not the test's context: it ends before the cleanup, which still needs the cluster.
	l.Cluster, err = cluster.Start(l.ctx, cluster.Config{Binary: binary, Folder: folder, SchedulerConfig: schedulerConfig})
	t.Cleanup(func() {
		if l.Cluster != nil {
			l.Cluster.Stop()
		}
		if t.Failed() || os.Getenv("NVSHARE_TEST_KEEP") != "" {
			t.Logf("logs are kept in %s", filepath.Join(folder, "logs"))
			return
		}
		os.RemoveAll(folder)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the control plane is ready after %v", time.Since(started).Round(time.Millisecond))
	l.image(applicationImage, map[string]string{
		"nvshare-test-calls": "usr/local/bin/nvshare-test-calls",
		"nvshare":            "usr/local/bin/nvshare",
	})
	return l
}

func setting(name, usual string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return usual
}

// image makes an image of files that cargo has built, by their places in it.
func (l *lab) image(name string, files map[string]string) {
	l.Helper()
	for file, place := range files {
		to := filepath.Join(l.Images(), name, place)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			l.Fatal(err)
		}
		l.must(copyFile(filepath.Join(l.built, file), to))
	}
}

// gpuNode is a node with simulated GPUs.
type gpuNode struct {
	*cluster.Node
	lab *lab
	// uuids of the GPUs, by their numbers.
	uuids   []string
	arbiter *cluster.Process
	// by is what offers its GPUs, and offered the process that does.
	by      offer
	offered *cluster.Process
	// environment leads programs on the node to its simulated GPUs.
	environment []string
}

// addNode adds a node with so many simulated GPUs of 256 MiB, whose driver is installed as a vendor's would be: libraries, and CDI
// devices by the GPUs' UUIDs.
func (l *lab) addNode(name string, gpus int) *gpuNode {
	l.Helper()
	started := time.Now()
	node, err := l.AddNode(l.ctx, name, map[string]string{"nvshare.com/gpu.present": "true"})
	l.must(err)
	l.Logf("%s is ready after %v", name, time.Since(started).Round(time.Millisecond))
	n := &gpuNode{Node: node, lab: l}
	simulated := []string{
		"NVSHARE_SIM_NAME=simulated-" + name,
		fmt.Sprintf("NVSHARE_SIM_GPUS=%d", gpus),
		"NVSHARE_SIM_MEMORY=256MiB",
		"NVSHARE_SIM_UUIDS=ascending",
		"NVSHARE_SIM_NVML_FAULTS=" + faults,
	}
	n.environment = append([]string{"LD_LIBRARY_PATH=" + driver}, simulated...)
	n.install("libsimcuda.so", driver+"/libcuda.so.1")
	n.install("libsimnvml.so", driver+"/libnvidia-ml.so.1")
	n.install("libnvshare.so", "/usr/lib/nvshare/libnvshare.so")
	n.uuids = n.listGPUs()
	type edits map[string]any
	var devices []map[string]any
	for number, uuid := range n.uuids {
		devices = append(devices, map[string]any{"name": uuid, "containerEdits": edits{
			// Which of the GPUs a container has: what a real one tells by its device nodes.
			"env": []string{fmt.Sprintf("SIMULATED_GPU_%d=%s", number, uuid)},
		}})
	}
	spec, err := json.Marshal(map[string]any{
		"cdiVersion": "0.6.0", "kind": simulatedKind, "devices": devices,
		"containerEdits": edits{
			"env": n.environment,
			"mounts": []map[string]any{
				{"hostPath": driver, "containerPath": driver, "options": []string{"ro", "rbind"}},
				// The simulated GPUs' memory and state.
				{"hostPath": "/dev/shm", "containerPath": "/dev/shm", "options": []string{"rw", "rbind"}},
			},
		},
	})
	l.must(err)
	l.must(n.Write(l.ctx, "/etc/cdi/simulated.json", string(spec)))
	return n
}

// install puts what cargo has built onto the node.
func (n *gpuNode) install(file, to string) {
	n.lab.Helper()
	_, err := n.Run(n.lab.ctx, nil, "install", "-D", "-m", "0755", filepath.Join(n.lab.built, file), to)
	n.lab.must(err)
}

// listGPUs asks the simulated driver.
func (n *gpuNode) listGPUs() []string {
	n.lab.Helper()
	out, err := n.Run(n.lab.ctx, n.environment, filepath.Join(n.lab.built, "nvshare-kubernetes"),
		"--log-level=error", "device-plugin", "--print=json")
	n.lab.must(err)
	var gpus []struct {
		UUID  string `json:"uuid"`
		Index int    `json:"index"`
	}
	n.lab.must(json.Unmarshal([]byte(out), &gpus))
	uuids := make([]string, len(gpus))
	for _, gpu := range gpus {
		uuids[gpu.Index] = gpu.UUID
	}
	return uuids
}

// startArbiter starts the arbiter on the node.
func (n *gpuNode) startArbiter(options ...string) {
	n.lab.Helper()
	n.arbiter = n.Program("arbiter", n.environment,
		append([]string{filepath.Join(n.lab.built, "nvshare-arbiter"), "--listen=none", "--capacity=192MiB"}, options...)...)
	n.lab.must(n.arbiter.Start())
	n.arbiterReady()
}

func (n *gpuNode) arbiterReady() {
	n.lab.Helper()
	n.lab.until("the arbiter answers", func() error {
		if !n.arbiter.Running() {
			n.lab.Fatalf("the arbiter has ended: %s", n.arbiter.Tail(10))
		}
		_, err := n.Run(n.lab.ctx, n.environment, filepath.Join(n.lab.built, "nvshare"), "wait", "--timeout", "1s")
		return err
	})
}

func (n *gpuNode) number(uuid string) int {
	n.lab.Helper()
	for number, known := range n.uuids {
		// A device's name in DRA is in small letters.
		if strings.EqualFold(known, uuid) {
			return number
		}
	}
	n.lab.Fatalf("%s has no GPU %s", n.Name, uuid)
	return -1
}

// pod is a pod that asks for so many virtual GPUs and runs a command.
func pod(name string, count int64, command ...string) *corev1.Pod {
	no, zero := false, int64(0)
	quantity := corev1.ResourceList{resourceName: *resource.NewQuantity(count, resource.DecimalSI)}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default"},
		Spec: corev1.PodSpec{
			AutomountServiceAccountToken: &no, EnableServiceLinks: &no, TerminationGracePeriodSeconds: &zero,
			RestartPolicy: corev1.RestartPolicyNever,
			// Processes that share a simulated GPU must see each other; a real driver sees all.
			HostPID: true,
			Containers: []corev1.Container{{
				Name: "main", Image: applicationImage, Command: command,
				Resources: corev1.ResourceRequirements{Limits: quantity, Requests: quantity},
			}},
		},
	}
}

func (l *lab) create(pod *corev1.Pod) *corev1.Pod {
	l.Helper()
	made, err := l.Client.CoreV1().Pods(pod.Namespace).Create(l.ctx, pod, metav1.CreateOptions{})
	l.must(err)
	return made
}

func (l *lab) get(name string) *corev1.Pod {
	l.Helper()
	pod, err := l.Client.CoreV1().Pods("default").Get(l.ctx, name, metav1.GetOptions{})
	l.must(err)
	return pod
}

// isRunning says whether a pod runs.
func isRunning(pod *corev1.Pod) error {
	if pod.Status.Phase != corev1.PodRunning {
		return fmt.Errorf("%s: %s %s %s", pod.Name, pod.Status.Phase, pod.Status.Reason, pod.Status.Message)
	}
	return nil
}

func (l *lab) delete(names ...string) {
	l.Helper()
	for _, name := range names {
		l.must(l.Client.CoreV1().Pods("default").Delete(l.ctx, name, metav1.DeleteOptions{}))
	}
}

// pods are all pods of the namespace default, by name.
func (l *lab) pods() map[string]*corev1.Pod {
	l.Helper()
	list, err := l.Client.CoreV1().Pods("default").List(l.ctx, metav1.ListOptions{})
	l.must(err)
	found := make(map[string]*corev1.Pod)
	for i := range list.Items {
		found[list.Items[i].Name] = &list.Items[i]
	}
	return found
}

// running waits until all pods of the namespace default run, of which there must be so many.
func (l *lab) running(count int) {
	l.Helper()
	l.until(fmt.Sprintf("%d pods run", count), func() error {
		pods := l.pods()
		if len(pods) != count {
			return fmt.Errorf("there are %d", len(pods))
		}
		waiting := 0
		last := ""
		for name, pod := range pods {
			if pod.Status.Phase != corev1.PodRunning {
				waiting++
				last = fmt.Sprintf("%s: %s %s", name, pod.Status.Phase, pod.Status.Message)
			}
		}
		if waiting > 0 {
			return fmt.Errorf("%d do not, such as %s", waiting, last)
		}
		return nil
	})
}

// until waits for something that the cluster brings about.
func (l *lab) until(what string, done func() error) {
	l.Helper()
	var last error
	err := wait.PollUntilContextTimeout(l.ctx, 50*time.Millisecond, cluster.Patience, true, func(context.Context) (bool, error) {
		last = done()
		return last == nil, nil
	})
	if err != nil {
		l.Fatalf("still not: %s: %v", what, last)
	}
}

func (l *lab) must(err error) {
	l.Helper()
	if err != nil {
		l.Fatal(err)
	}
}

func copyFile(from, to string) error {
	if out, err := exec.Command("cp", from, to).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}
