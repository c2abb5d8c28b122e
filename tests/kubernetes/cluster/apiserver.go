package cluster

import (
	"context"
)

func (c *Cluster) startAPIServer(ctx context.Context) error {
	pki := c.authority
	names := []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc"}
	if err := pki.server("apiserver", names, controlPlane, service); err != nil {
		return err
	}
	// How the API server presents itself to kubelets, for logs.
	if _, err := pki.client("apiserver-kubelet", "kube-apiserver", "system:masters"); err != nil {
		return err
	}
	// Signs the tokens of service accounts.
	if err := pki.server("service-accounts", nil); err != nil {
		return err
	}
	c.APIServer = c.component("kube-apiserver",
		"--etcd-servers="+etcdURL,
		"--bind-address=0.0.0.0",
		"--secure-port=443",
		"--advertise-address="+controlPlane,
		"--service-cluster-ip-range="+services,
		"--tls-cert-file="+pki.path("apiserver.crt"),
		"--tls-private-key-file="+pki.path("apiserver.key"),
		"--client-ca-file="+pki.path("ca.crt"),
		"--kubelet-client-certificate="+pki.path("apiserver-kubelet.crt"),
		"--kubelet-client-key="+pki.path("apiserver-kubelet.key"),
		// Nodes' names are in no DNS.
		"--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file="+pki.path("service-accounts.key"),
		"--service-account-signing-key-file="+pki.path("service-accounts.key"),
		// A node may change its own objects alone, and a service account what its roles allow: the chart's rights are tried.
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--allow-privileged=true",
	)
	if err := c.APIServer.Start(); err != nil {
		return err
	}
	return c.APIServerReady(ctx)
}

// APIServerReady waits until the API server serves, for example after a restart.
func (c *Cluster) APIServerReady(ctx context.Context) error {
	return await(ctx, "the API server is ready", c.APIServer, func(ctx context.Context) error {
		return c.Client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	})
}
