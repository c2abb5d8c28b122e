package kubernetes

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	resourcev1 "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// event waits for an event of a pod, and gives its message.
func (l *lab) event(pod, reason string) string {
	l.Helper()
	var message string
	l.until(fmt.Sprintf("%s has an event %s", pod, reason), func() error {
		events, err := l.Client.CoreV1().Events("default").List(l.ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=" + pod})
		l.must(err)
		var seen []string
		for _, event := range events.Items {
			if event.Reason == reason {
				message = event.Message
				return nil
			}
			seen = append(seen, event.Reason+": "+event.Message)
		}
		return fmt.Errorf("events: %s", strings.Join(seen, "; "))
	})
	return message
}

// refused waits until the kubelet has refused a pod, and gives its message.
func (l *lab) refused(name string) string {
	l.Helper()
	l.until(name+" is refused", func() error {
		pod := l.get(name)
		if pod.Status.Phase != corev1.PodFailed {
			return fmt.Errorf("%s %s", pod.Status.Phase, pod.Status.Message)
		}
		return nil
	})
	return l.get(name).Status.Message
}

func says(t *testing.T, message string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(message, part) {
			t.Fatalf("the message does not say %q: %s", part, message)
		}
	}
}

// none is what the scheduler says of a pod for which no GPU is left.
func (n *gpuNode) none() string {
	if n.by == dra {
		return "cannot allocate all claims"
	}
	return "Insufficient " + resourceName
}

// What a pod's owner reads who asks for what cannot be.
func TestRequestsThatCannotBeMet(t *testing.T) {
	l := newLab(t, "")
	n := l.addNode("node-1", 1)
	n.startArbiter()
	n.start(devicePlugin)

	for _, count := range []string{"-1", "0.5"} {
		wrong := pod("wrong", 1, "true")
		quantity := wrong.Spec.Containers[0].Resources.Limits[resourceName].DeepCopy()
		l.must(quantity.UnmarshalJSON([]byte(count)))
		wrong.Spec.Containers[0].Resources.Limits[resourceName] = quantity
		wrong.Spec.Containers[0].Resources.Requests[resourceName] = quantity
		_, err := l.Client.CoreV1().Pods("default").Create(l.ctx, wrong, metav1.CreateOptions{})
		if err == nil {
			t.Fatalf("the API server takes %s of %s", count, resourceName)
		}
		says(t, err.Error(), resourceName)
	}

	// None is none: the pod runs, without a GPU and without nvshare.
	l.create(pod("none", 0, "sleep", "infinity"))
	l.until("a pod that asks for 0 runs", func() error { return isRunning(l.get("none")) })
	container, err := n.Container(l.ctx, l.get("none"), "main")
	l.must(err)
	if preload := container.Env("LD_PRELOAD"); preload != "" {
		t.Fatalf("a pod that asks for 0 has LD_PRELOAD=%s", preload)
	}

	l.create(pod("eleven", 11, "true"))
	says(t, l.event("eleven", "FailedScheduling"), "Insufficient "+resourceName)
}

// The GPU is lost while the node offers it.
func TestAGPUThatGoesAway(t *testing.T) { onEach(t, aGPUThatGoesAway) }

func aGPUThatGoesAway(t *testing.T, by offer) {
	l := newLab(t, "")
	n := l.addNode("node-1", 2)
	n.startArbiter()
	n.start(by)
	l.must(n.Write(l.ctx, faults, "1 lost\n"))
	l.until("one GPU of two is left", func() error { return n.offers(1) })
	says(t, n.offered.Tail(1000), "NVML does not reach "+n.uuids[1], "nvidia-smi -r")
	for i := range 10 {
		counts := n.comes(fmt.Sprintf("pod-%d", i))
		if counts[1] > 0 {
			t.Fatalf("a pod came to the GPU that is lost: %v", counts)
		}
	}
	l.create(pod("one-too-many", 1, "true"))
	says(t, l.event("one-too-many", "FailedScheduling"), n.none())
	// The pod waits, and comes when the GPU does.
	l.must(n.Write(l.ctx, faults, ""))
	l.until("it runs to its end on the GPU that is back", func() error {
		if pod := l.get("one-too-many"); pod.Status.Phase != corev1.PodSucceeded {
			return fmt.Errorf("%s %s", pod.Status.Phase, pod.Status.Message)
		}
		return nil
	})
}

// Nobody serves the GPUs: pods wait, and the plugin's log says for what.
func TestAnArbiterThatIsGone(t *testing.T) { onEach(t, anArbiterThatIsGone) }

func anArbiterThatIsGone(t *testing.T, by offer) {
	l := newLab(t, "")
	n := l.addNode("node-1", 1)
	n.startArbiter()
	n.start(by, "--arbiter-grace=2s")
	l.create(pod("before", 1, "sleep", "infinity"))
	l.until("the first pod runs", func() error { return isRunning(l.get("before")) })
	n.arbiter.Kill()
	l.until("no GPU can be had", func() error { return n.offers(0) })
	says(t, n.offered.Tail(1000), "no arbiter answers in /run/nvshare", "start it again")
	l.create(pod("meanwhile", 1, "true"))
	says(t, l.event("meanwhile", "FailedScheduling"), n.none())
	l.must(isRunning(l.get("before")))
	l.must(n.arbiter.Start())
	l.until("the pod that waited runs to its end", func() error {
		if pod := l.get("meanwhile"); pod.Status.Phase != corev1.PodSucceeded {
			return fmt.Errorf("%s %s", pod.Status.Phase, pod.Status.Message)
		}
		return nil
	})
}

// The plugin's socket is removed behind its back. The kubelet keeps its connection, and takes no second registration meanwhile. A kubelet that starts
// anew finds the new socket.
func TestASocketThatIsGone(t *testing.T) {
	l := newLab(t, "")
	n := l.addNode("node-1", 1)
	n.startArbiter()
	n.start(devicePlugin)
	_, err := n.Run(l.ctx, nil, "/bin/sh", "-c", "rm /var/lib/kubelet/device-plugins/nvshare*.sock")
	l.must(err)
	l.until("there is a socket again", func() error {
		_, err := n.Run(l.ctx, nil, "/bin/sh", "-c", "test -S /var/lib/kubelet/device-plugins/nvshare*.sock")
		return err
	})
	n.comes("after")
	n.restartKubelet()
	n.comes("after-a-restart")

	// Without the kubelet's folder there is nobody to register with.
	out, err := n.Run(l.ctx, n.environment, filepath.Join(l.built, "nvshare-kubernetes"), "device-plugin", "--kubelet-dir=/nowhere")
	if err == nil {
		t.Fatal("a plugin starts without a kubelet's folder")
	}
	says(t, out, "/nowhere", "--kubelet-dir")
}

// claimed is a pod whose container has a claim of its own: so much of a GPU, with this configuration of the client, if it is not empty.
func (l *lab) claimed(name string, capacity map[string]string, parameters string) *corev1.Pod {
	l.Helper()
	requests := make(map[resourcev1.QualifiedName]resource.Quantity)
	for what, quantity := range capacity {
		requests[resourcev1.QualifiedName(what)] = resource.MustParse(quantity)
	}
	claim := &resourcev1.ResourceClaim{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default"},
		Spec: resourcev1.ResourceClaimSpec{Devices: resourcev1.DeviceClaim{Requests: []resourcev1.DeviceRequest{{
			Name: "gpu", Exactly: &resourcev1.ExactDeviceRequest{
				DeviceClassName: driverName, Capacity: &resourcev1.CapacityRequirements{Requests: requests},
			},
		}}}},
	}
	if parameters != "" {
		claim.Spec.Devices.Config = []resourcev1.DeviceClaimConfiguration{{DeviceConfiguration: resourcev1.DeviceConfiguration{
			Opaque: &resourcev1.OpaqueDeviceConfiguration{Driver: driverName, Parameters: runtime.RawExtension{Raw: []byte(parameters)}},
		}}}
	}
	_, err := l.Client.ResourceV1().ResourceClaims("default").Create(l.ctx, claim, metav1.CreateOptions{})
	l.must(err)
	made := pod(name, 0, job("64MiB")...)
	made.Spec.ResourceClaims = []corev1.PodResourceClaim{{Name: "gpu", ResourceClaimName: &name}}
	made.Spec.Containers[0].Resources = corev1.ResourceRequirements{Claims: []corev1.ResourceClaim{{Name: "gpu"}}}
	return l.create(made)
}

// Claims say how much they want. What the scheduler counts it refuses; what it does not see the driver refuses.
func TestClaimsThatCannotBeMet(t *testing.T) {
	l := newLab(t, "")
	n := l.addNode("node-1", 1)
	n.startArbiter()
	n.start(dra, "--memory-overcommit=2")

	// A pool of 192 MiB, given away twice; no client can have more than the pool.
	l.claimed("too-much", map[string]string{"memory": "200Mi"}, "")
	says(t, l.event("too-much", "FailedScheduling"), "cannot allocate all claims")
	l.claimed("eleven-shares", map[string]string{"shares": "11"}, "")
	says(t, l.event("eleven-shares", "FailedScheduling"), "cannot allocate all claims")
	l.claimed("misspelt", nil, `{"apiVersion": "nvshare.com/v1", "kind": "ClientConfig", "priority": "urgent"}`)
	says(t, l.event("misspelt", "FailedPrepareDynamicResources"), "urgent", "low", "high", "Correct it")
	l.delete("misspelt")
	l.must(l.Client.ResourceV1().ResourceClaims("default").Delete(l.ctx, "misspelt", metav1.DeleteOptions{}))

	// What can be met is kept: the memory is the client's limit.
	l.claimed("fits", map[string]string{"memory": "96Mi", "cores": "30"}, `{"apiVersion": "nvshare.com/v1", "kind": "ClientConfig", "priority": "high"}`)
	n.wants("fits", 64*mib)
	container, err := n.Container(l.ctx, l.get("fits"), "main")
	l.must(err)
	for name, wanted := range map[string]string{"NVSHARE_MEMORY_LIMIT": "96MiB", "NVSHARE_PRIORITY": "high"} {
		if value := container.Env(name); value != wanted {
			t.Fatalf("%s is %q in the container, and not %q", name, value, wanted)
		}
	}
	// It goes before others, and would keep the next one waiting.
	l.delete("fits")
	l.claimed("over-its-limit", map[string]string{"memory": "48Mi"}, "")
	l.until("a job that needs more than its claim fails", func() error {
		if pod := l.get("over-its-limit"); pod.Status.Phase != corev1.PodFailed {
			return fmt.Errorf("%s: %s; clients: %v", pod.Status.Phase, n.logs("over-its-limit"), n.clients())
		}
		return nil
	})
	says(t, n.logs("over-its-limit"), "memory")
}
